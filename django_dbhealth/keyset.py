"""By which fields a table is read in pieces, and what comes after a row."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from django.core.exceptions import FieldDoesNotExist, ValidationError
from django.db.models import BooleanField, F, Func, Q, Value

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from django.db.models import Field, Model


class Key(NamedTuple):
    """Fields that are unique together and never NULL, each with its direction.

    A position is the value of a single field, or the tuple of the values of several.
    """

    given: tuple[str, ...]  # as order_by
    fields: tuple[Field[Any, Any], ...]
    signs: tuple[str, ...]  # "" or "-"

    @classmethod
    def of(cls, model: type[Model], order_by: str | Sequence[str]) -> Key:
        """Return the key that the names stand for, or say why they are none."""
        given = [order_by] if isinstance(order_by, str) else order_by
        names = tuple(given) if isinstance(given, (list, tuple)) else ()
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError(
                'order_by is the name of a field or several, such as "pk" or ("created", "pk").'
            )
        found = [
            (field, "-" if name.startswith("-") else "")
            for name in names
            for field in _fields_named(model, name.removeprefix("-"))
        ]
        key = cls(names, *zip(*found, strict=True))
        if not _is_unique(model, {field.name for field in key.fields}):
            raise ValueError(
                f"order_by={order_by!r} is not unique in {model.__name__}: rows with equal values "
                f"could be skipped. Write {(*names, 'pk')!r}."
            )
        return key

    @property
    def names(self) -> list[str]:
        return [field.attname for field in self.fields]

    @property
    def ordering(self) -> list[str]:
        """What ``order_by()`` takes."""
        return [sign + name for sign, name in zip(self.signs, self.names, strict=True)]

    @property
    def opposite(self) -> Key:
        """The key with each direction turned round."""
        return self._replace(signs=tuple("" if sign else "-" for sign in self.signs))

    @property
    def hidden(self) -> dict[str, F]:
        """What ``annotate()`` takes, to read the key where the queryset does not."""
        return {f"_dbhealth_key_{number}": F(name) for number, name in enumerate(self.names)}

    def parse(self, start_after: Any) -> Any:
        """Return a position from what a program has kept of one: text will do."""
        if start_after is None:
            return None
        several = len(self.fields) > 1
        if several and not isinstance(start_after, (tuple, list)):
            raise TypeError(f"start_after is a tuple of the values of {', '.join(self.names)}.")
        values = start_after if several else [start_after]
        if len(values) != len(self.fields) or None in values:
            raise ValueError(f"start_after has one value for each of {', '.join(self.names)}.")
        try:
            found = tuple(
                field.to_python(value) for field, value in zip(self.fields, values, strict=True)
            )
        except (ValidationError, TypeError, ValueError) as error:
            raise ValueError(
                f"start_after is no value of {', '.join(self.names)}: "
                "pass what .position of an iterator with the same order_by was."
            ) from error
        return found if several else found[0]

    def values(self, position: Any) -> dict[Field[Any, Any], Any]:
        """Return the value of each field at a position."""
        values = position if len(self.fields) > 1 else (position,)
        return dict(zip(self.fields, values, strict=True))

    def after(
        self,
        position: Any,
        *,
        row_values: bool,
        as_expression: type[Value] = Value,
        inclusive: bool = False,
    ) -> Q | Func:
        """Return the condition for the rows that come after the position.

        ``row_values``: where the database finds ``(a, b) > (x, y)`` by an index. The values in it
        are of the class ``as_expression``. ``inclusive``: the row at the position too.
        """
        values = [
            as_expression(value, output_field=field)
            for field, value in self.values(position).items()
        ]
        if row_values and len(self.fields) > 1 and len(set(self.signs)) == 1:
            return self._after_row(values, inclusive=inclusive)
        after = Q()
        last = "e" if inclusive else ""
        for name, sign, value in reversed([*zip(self.names, self.signs, values, strict=True)]):
            lookup = f"{name}__{'lt' if sign else 'gt'}"
            beyond = Q(**{lookup if after else lookup + last: value})
            after = beyond | (Q(**{name: value}) & after) if after else beyond
        if len(self.fields) > 1:  # an index is entered at the first field's value
            after = Q(**{f"{name}__{'lte' if sign else 'gte'}": value}) & after
        return after

    def _after_row(self, values: Sequence[Value], *, inclusive: bool) -> Func:
        operator = ("<" if self.signs[0] else ">") + ("=" if inclusive else "")
        return Func(
            Func(*map(F, self.names), template="(%(expressions)s)"),
            Func(*values, template="(%(expressions)s)"),
            template="%(expressions)s",
            arg_joiner=f" {operator} ",
            output_field=BooleanField(),
        )


def _fields_named(model: type[Model], name: str) -> Sequence[Field[Any, Any]]:
    """Return the field of that name, or the fields of the primary key."""
    options = model._meta
    if name == "pk":
        return options.pk_fields
    field: Any = None
    with suppress(FieldDoesNotExist):
        field = options.get_field(name)
    if field is None or not getattr(field, "column", None):
        raise ValueError(
            f"order_by names {name!r}, which is no column of {model.__name__}. "
            'Write "pk" or fields of the model itself.'
        )
    if field.null:
        raise ValueError(
            f"order_by names {name!r}, which may be NULL in {model.__name__}: such rows have no "
            'place in the order. Write "pk", or a field with null=False.'
        )
    return [field]


def _is_unique(model: type[Model], names: set[str]) -> bool:
    return any(unique <= names for unique in _unique_sets(model))


def _unique_sets(model: type[Model]) -> Iterator[set[str]]:
    """Yield the names of each set of fields that the database keeps unique."""
    for options in (each._meta for each in (model, *model._meta.get_parent_list())):
        yield {field.name for field in options.pk_fields}
        yield from ({field.name} for field in options.fields if field.unique)
        yield from map(set, options.unique_together)
        yield from (set(each.fields) for each in options.total_unique_constraints)
