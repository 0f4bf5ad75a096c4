"""``path("health/", include("django_dbhealth.urls"))``."""

from __future__ import annotations

from django.urls import path

from . import views

app_name = "django_dbhealth"

urlpatterns = [
    path("", views.health, name="health"),
    path("detail/", views.health_detail, name="health-detail"),
]
