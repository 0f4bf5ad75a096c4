"""The tests' model: no migrations, so its table is made by whoever needs it."""

from __future__ import annotations

from django.db import models


class Row(models.Model):
    name = models.CharField(max_length=100)
    number = models.IntegerField(default=0)

    def __str__(self) -> str:
        return self.name
