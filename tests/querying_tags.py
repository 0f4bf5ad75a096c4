"""A template tag that makes a query, as a menu in a base template may."""

from __future__ import annotations

from django import template

from tests.app.models import Row

register = template.Library()


@register.simple_tag
def rows() -> int:
    return Row.objects.using("private").count()
