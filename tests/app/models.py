"""The tests' models: no migrations, so their tables are made by whoever needs them."""

from __future__ import annotations

import uuid

from django.db import models


class Row(models.Model):
    name = models.CharField(max_length=100)
    number = models.IntegerField(default=0)

    def __str__(self) -> str:
        return self.name


class Book(models.Model):
    """What a large table may look like."""

    code = models.CharField(max_length=20, unique=True)
    place = models.IntegerField(null=True, unique=True)
    created = models.DateTimeField()
    shelf = models.IntegerField()
    number = models.IntegerField()
    title = models.CharField(max_length=100, default="")
    sequel_of = models.ForeignKey(
        "self", null=True, on_delete=models.CASCADE, related_name="sequels"
    )

    class Meta:
        ordering = ["-created"]
        constraints = [
            models.UniqueConstraint(fields=["shelf", "number"], name="one_book_a_place"),
        ]

    def __str__(self) -> str:
        return self.code


class Novel(Book):
    """A table whose primary key is a relation to another one."""

    class Meta:
        ordering = ["title"]


class Loan(models.Model):
    """A table with a UUID."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    book = models.ForeignKey(Book, null=True, on_delete=models.CASCADE, related_name="loans")

    def __str__(self) -> str:
        return str(self.id)


class Page(models.Model):
    """A table with a composite primary key."""

    pk = models.CompositePrimaryKey("volume", "number")
    volume = models.IntegerField()
    number = models.IntegerField()
    text = models.CharField(max_length=100, default="")

    def __str__(self) -> str:
        return self.text
