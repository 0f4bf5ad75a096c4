"""A query that Django compiles once, to be run with other values each time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.db.models import Value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from django.db.models import Field, QuerySet


class Slot(Value):
    """The value of a field, which is not the same in each run."""

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        sql, parameters = super().as_sql(compiler, connection)
        return sql, type(parameters)([self])  # type: ignore[list-item]


class CompiledQuery:
    """The query of a queryset with slots in it, run for instances or for tuples.

    To build and to compile a query takes Django longer than to run it. Where the querysets' own
    iterators ask for a compiler, and the compiler for its SQL, they find what is kept here. Raises
    ``EmptyResultSet`` where Django sees without asking that there are no rows.
    """

    def __init__(self, rows: QuerySet[Any, Any], size: int) -> None:
        self._rows: Any = rows
        self._size = size
        query: Any = rows.query
        self._compiler = query.get_compiler(rows.db)
        self._sql, self._parameters = self._compiler.as_sql()
        query.get_compiler = lambda *args, **kwargs: self._compiler

    def run(self, values: Mapping[Field[Any, Any], Any]) -> Iterator[Any]:
        """Return the rows. They are all here with the first one, and no cursor is open.

        Instances are made one by one, as ``iterator()`` does: to make all of them first takes a
        third longer.
        """
        connection = self._compiler.connection
        parameters = tuple(
            each.output_field.get_db_prep_value(values[each.output_field], connection=connection)
            if isinstance(each, Slot)
            else each
            for each in self._parameters
        )
        self._compiler.as_sql = lambda: (self._sql, parameters)
        return iter(self._rows._iterable_class(self._rows, chunk_size=self._size))
