"""What a statement leaves behind in its session.

A lost connection may be replaced silently only if its session held nothing that a new one would
not have. A `SessionState` sees every SQL text that succeeded and keeps what is held now. Which
statements hold what is the vendors' knowledge: tables of `Rule`, `Call` and `Mention`, one line
each, made once into a `RuleSet`.

In doubt a thing is held: the cost is an error that plain Django would have given too. What a text
does not show (a stored procedure's work, a function's, a trigger's) is not seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

TRANSACTION = "transaction begun by raw SQL"

OPAQUE = "whatever a statement that is no text has set"

# Up to this length a text is searched in lower case, and what it means remembered.
SHORT_TEXT = 1_000

_FIRST_WORD = re.compile(
    # No comment that is code (MySQL's /*! … */), none with another in it (PostgreSQL nests them).
    r"(?:[\s(]|/\*(?!M?!)(?:(?!/\*|\*/).)*\*/|--[^\n]*\n|#[^\n]*\n)*(\w*)",
    re.DOTALL,
)
# What is before " FROM " where that may be no clause: in a literal, a comment, a call, a subquery …
_UNSURE = ("'", '"', "(", "/", "-", "$", "with")
_UNSURE_ENDS = ("distinct", "as", ".")  # IS DISTINCT FROM, AS FROM, a column of this name
_PLACEHOLDER = re.compile(r"%(%)|%\(([^)%]+)\)[sbt]|%[sbt]")
_SYMBOL = re.compile(r"\s*(:?=|[(),.])\s*")
_PART = r"""(?:[\w$]+|["']\d+["'])"""
NAME = rf"({_PART}(?:\.{_PART})*)"
_LAST_NAME = re.compile(r"[\w$]+\Z")
_PLAIN_CALLS = re.compile(
    rf"(?:SELECT|DO) (?:CALL(?: ::\w+)?(?: AS)?(?: {_PART})?(?: , |\Z))+", re.IGNORECASE
)


class Rule(NamedTuple):
    """What a statement of this syntax holds or gives back; with neither, it counts for nothing.

    `syntax` is written as in the manuals: `[optional]`, `{one|of these}`, `...` for anything,
    `name`, `names`; the first rule that fits decides. A rule that gives back describes the whole
    statement, others its beginning. `{}` in a description takes the name, or what parentheses
    hold. With `holds` and `frees`, what was seen held is given back, what was not is held now.
    """

    syntax: str
    holds: str = ""
    frees: str = ""
    frees_all: tuple[str, ...] = ()  # shell patterns of descriptions
    undoable: bool = False  # a rollback takes the giving back back
    undoes: bool = False  # it is such a rollback


class Call(NamedTuple):
    """What a function holds or gives back, wherever it is called."""

    function: str
    holds: str = ""
    frees: str = ""
    frees_all: tuple[str, ...] = ()
    named_by: int = 0  # that many first arguments say which lock it is, and locks are counted
    stands_for: str = ""  # a statement; `{}` takes the first argument
    unless_last: str = ""  # counts for nothing when the last argument is this word


class Mention(NamedTuple):
    """What is held wherever it appears in a statement: a regular expression with one group."""

    pattern: str
    holds: str


class Markers(NamedTuple):
    """What makes an everyday statement worth a look, in lower case."""

    all: tuple[str, ...]
    characters: tuple[str, ...]
    words: tuple[str, ...]
    calls: tuple[str, ...]  # parts of functions' names

    @classmethod
    def of(cls, characters: str, words: Sequence[str]) -> Markers:
        calls = tuple(word for word in words if word.startswith("_"))
        others = tuple(word for word in words if not word.startswith("_"))
        return cls((*characters, *words), tuple(characters), others, calls)


class Effect(NamedTuple):
    """What one text does to the state, as far as it can be told before its parameters are known."""

    rule: Rule | Call
    name: str = ""
    key: str | None = ""  # of a counted lock, with placeholders; None: cannot be told


class RuleSet:
    """One vendor's rules, made once and shared by its connections.

    `tokens`: a regular expression with the groups comment, code (a comment that is run), text,
    name, placeholder and end, for what is not plain words.
    `quiet`: the first words of everyday statements, and for each what must appear in it, in lower
    case, to make it worth a look; what begins with an underscore is of a function's name.
    `quiet_characters`: likewise, for all of them.
    `folds_case`: whether unquoted names mean the same in any case.
    `rewrites`: spellings of the same thing made one. `lists`: statements that are lists of
    assignments, each looked at by itself. `doubtful`: statements with a body that is not followed.
    `pure_functions`: those whose value depends on their arguments alone.
    """

    def __init__(
        self,
        *rules: Rule | Call | Mention,
        tokens: str,
        quiet: Mapping[str, tuple[str, ...]],
        quiet_characters: str,
        folds_case: bool = False,
        rewrites: Sequence[tuple[str, str]] = (),
        lists: str = r"(?!)",
        doubtful: str = r"(?!)",
        pure_functions: Sequence[str] = (),
    ) -> None:
        self._calls = {rule.function: rule for rule in rules if isinstance(rule, Call)}
        self._mentions = [rule for rule in rules if isinstance(rule, Mention)]
        self._rules: dict[str, list[Rule]] = {}
        for rule in rules:
            if isinstance(rule, Rule):
                self._rules.setdefault(rule.syntax.partition(" ")[0], []).append(rule)
        self._tokens = tokens
        self._quiet = {word: Markers.of(quiet_characters, words) for word, words in quiet.items()}
        self._folds_case = folds_case
        self._rewrites = rewrites
        self._lists = lists
        self._doubtful = doubtful
        self._pure_functions = pure_functions
        # What a SELECT has that is worth a look, in lower case: with a parenthesis, and without one
        # (and so without a call).
        in_select = Markers.of(quiet_characters, quiet.get("SELECT", ()))
        self.words_in_select = (*in_select.words, *in_select.calls)
        self.words_without_call = in_select.words
        self._remembered = lru_cache(maxsize=512)(self._effects)

    def effects(self, sql: str) -> tuple[Effect, ...]:
        """Return what a text does; for nearly all, nothing."""
        if self.is_quiet(sql):
            return ()
        return self._remembered(sql) if len(sql) <= SHORT_TEXT else self._effects(sql)

    def has_several(self, sql: object) -> bool:
        """Return whether a text has several statements in it; one that cannot be read may have."""
        text = sql if isinstance(sql, str) else _as_text(sql)
        if text is None or ";" not in text:
            return text is None
        pieces = _Text(self._token_pattern, text, self._folds_case).pieces
        return sum(not piece.isspace() and piece != "" for piece in pieces) > 1

    def is_quiet(self, sql: str) -> bool:
        """Tell cheaply that a text changes no state; False is no proof of the contrary."""
        markers = self._quiet.get(sql[:6])  # SELECT, INSERT, UPDATE, DELETE as the ORM writes them
        if markers is None:
            first_word = _FIRST_WORD.match(sql)
            markers = self._quiet.get(first_word[1].upper()) if first_word else None
            if markers is None:
                return False
        if len(sql) > SHORT_TEXT:
            return not _long_text_has(sql, markers)
        lower = sql.lower()
        for marker in markers.all:  # noqa: SIM110 (a generator would take as long as all the rest)
            if marker in lower:
                return False
        return True

    def _effects(self, sql: str) -> tuple[Effect, ...]:
        text = _Text(self._token_pattern, sql, self._folds_case)
        effects: list[Effect] = []
        sure = not text.has_executable_comment
        for statement in self._statements(text):
            sure = sure and not re.match(self._doubtful, statement, re.IGNORECASE)
            effects += self._statement_effects(statement, text)
            effects += self._mention_effects(statement, text)
            effects += self._call_effects(statement, text)
        # In a routine's body, or beside a comment that only some versions run, nothing is believed
        # to be given back.
        return tuple(effects if sure else map(_without_giving_back, effects))

    @cached_property
    def _token_pattern(self) -> re.Pattern[str]:
        return re.compile(self._tokens, re.DOTALL | re.VERBOSE)

    def _statements(self, text: _Text) -> Iterator[str]:
        for piece in text.pieces:
            if self.is_quiet(piece):  # now without what stands in its literals
                continue
            statement = self._rewrite(_spaced(piece).lstrip("( "))
            word, _, items = statement.partition(" ")
            if word.upper() == "SET":  # names of variables mean the same in any case
                statement, items = statement.lower(), items.lower()
            if re.match(self._lists, statement, re.IGNORECASE):
                yield from (self._rewrite(f"{word} {item}") for item in _split(items))
            else:
                yield statement

    def _rewrite(self, statement: str) -> str:
        for pattern, replacement in self._rewrites:
            statement = re.sub(pattern, replacement, statement, flags=re.IGNORECASE)
        return statement

    def _statement_effects(self, statement: str, text: _Text) -> Iterator[Effect]:
        for rule in self._rules.get(statement.partition(" ")[0].upper(), ()):
            pattern = _compile(rule.syntax)
            whole = _gives_back(rule) or rule.undoes
            match = (pattern.fullmatch if whole else pattern.match)(f"{statement} ")
            if match:
                groups = [group for group in match.groups() if group]
                names = groups[-1].split(" , ") if groups else [""]
                for name in names:
                    yield Effect(rule, text.spell(name.partition(" ")[0]))
                return

    def _mention_effects(self, statement: str, text: _Text) -> Iterator[Effect]:
        for mention in self._mentions:
            for match in re.finditer(mention.pattern, statement, re.IGNORECASE):
                yield Effect(Rule("", holds=mention.holds), text.spell(match[1].lower()))

    def _call_effects(self, statement: str, text: _Text) -> Iterator[Effect]:
        words = statement.split(" ")
        calls = list(self._find_calls(words))
        # In a plain list each call runs exactly once. Elsewhere (FROM, CASE, WHERE) they cannot be
        # counted: what may be held is held for good, what may be given back is not believed.
        is_plain = _is_plain_list(words, [(start, end) for start, end, _ in calls])
        for start, end, call in calls:
            arguments = _split(" ".join(words[start + 2 : end - 1]))
            if call.stands_for:
                yield from self._stand_in_effects(call, arguments, text)
            elif is_plain or call.holds:
                yield Effect(call, key=self._key(call, arguments, text) if is_plain else None)

    def _find_calls(self, words: list[str]) -> Iterator[tuple[int, int, Call]]:
        for start, end in zip(range(len(words)), range(1, len(words)), strict=False):
            if words[end] != "(":
                continue
            name = _LAST_NAME.search(words[start].lower())
            if name and name[0] in self._calls:
                yield start, _closing(words, end), self._calls[name[0]]

    def _stand_in_effects(self, call: Call, arguments: list[str], text: _Text) -> Iterator[Effect]:
        if arguments[-1].lower() == call.unless_last:
            return iter(())
        name = text.spell(arguments[0]).lower() if arguments[0].startswith("'") else ""
        return self._statement_effects(call.stands_for.format(name), text)

    def _key(self, call: Call, arguments: list[str], text: _Text) -> str | None:
        """Return what names a lock, None where it may be another the next time (a column)."""
        pure = "|".join(map(re.escape, self._pure_functions)) or r"(?!)"
        constant = rf"(?:(?:{pure}) \(|::\w+|'\d+'|%[^%]+%|-?\d+|[ ,()])*"
        named_by = " , ".join(arguments[: call.named_by])
        if not re.fullmatch(constant, named_by, re.IGNORECASE):
            return None
        return text.quote(named_by)


class SessionState:
    """What a session holds that a new one would not have."""

    def __init__(self, rules: RuleSet | tuple[()] = ()) -> None:
        self._rules = rules or NO_RULES
        self._held: dict[tuple[str, str], int] = {}
        self._returned: dict[tuple[str, str], int] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    @property
    def in_transaction(self) -> bool:
        """Whether raw SQL has begun a transaction."""
        return (TRANSACTION, "") in self._held

    def is_quiet(self, sql: object) -> bool:
        """Tell cheaply that a statement changes nothing, as nearly all do; False is no proof."""
        if not isinstance(sql, str):
            return False
        rules = self._rules
        if not sql.startswith("SELECT") or len(sql) > SHORT_TEXT or ";" in sql or "@" in sql:
            return rules.is_quiet(sql)
        words = rules.words_in_select if "(" in sql else rules.words_without_call
        if words:
            lower = sql.lower()
            for word in words:
                if word in lower:
                    return False
        return True

    def observe(self, sql: object, params: object = None) -> None:
        """Take note of a statement that succeeded."""
        text = sql if isinstance(sql, str) else _as_text(sql)
        if text is None:
            self._held[OPAQUE, ""] = 1
            return
        for effect in self._rules.effects(text):
            self._apply(effect, params)

    def descriptions(self) -> tuple[str, ...]:
        """Return what is held in plain words, sorted, without a statement's parameters."""
        return tuple(sorted({description for description, _ in self._held}))

    def forget(self) -> None:
        """Start again: the session is a new one."""
        self._held.clear()
        self._returned.clear()

    def transaction_began(self) -> None:
        """Take note that a rollback from here on undoes nothing of what was before."""
        self._returned.clear()

    def transaction_ended(self) -> None:
        """Take note of the end of a transaction that the driver, not a statement, has ended."""
        self._held.pop((TRANSACTION, ""), None)
        self._returned.clear()

    def rolled_back(self) -> None:
        """Take note of a rollback, also to a savepoint: PostgreSQL undoes a DROP or a RESET."""
        self._held |= self._returned
        self._returned.clear()

    def _apply(self, effect: Effect, params: object) -> None:
        rule = effect.rule
        if isinstance(rule, Rule):
            self._apply_rule(rule, effect.name)
        elif rule.frees_all:
            self._free_all(rule.frees_all)
        else:
            self._count(rule, _resolve(effect.key, params))

    def _apply_rule(self, rule: Rule, name: str) -> None:
        if rule.undoes:
            self.rolled_back()
        if rule.frees == TRANSACTION:
            self.transaction_ended()
            return
        returned = dict(self._free_all(rule.frees_all))
        item = (rule.frees.format(name).strip(), "")
        if item in self._held:
            returned[item] = self._held.pop(item)
        elif rule.holds:
            self._held[rule.holds.format(name).strip(), ""] = 1
        if rule.undoable:
            self._returned |= returned

    def _free_all(self, patterns: tuple[str, ...]) -> list[tuple[tuple[str, str], int]]:
        items = [i for i in self._held if any(fnmatchcase(i[0], pattern) for pattern in patterns)]
        return [(item, self._held.pop(item)) for item in items]

    def _count(self, call: Call, key: str | None) -> None:
        item = (call.holds or call.frees, key or "")
        if call.holds:
            self._held[item] = self._held.get(item, 0) + 1
        elif key and item in self._held:
            self._held[item] -= 1
            if not self._held[item]:
                del self._held[item]


class _Text:
    """A text in pieces, one for each statement, with its literals taken out.

    In a piece a literal is '0', '1' …, a quoted name "0", "1" …, a placeholder %0%, %1% … or
    %its name%.
    """

    def __init__(self, tokens: re.Pattern[str], sql: str, folds_case: bool) -> None:
        self._literals: list[str] = []
        self._placeholders = 0
        self.has_executable_comment = False
        fold = str.lower if folds_case else str
        pieces: list[list[str]] = [[]]
        position = 0
        for match in tokens.finditer(sql):
            pieces[-1].append(fold(sql[position : match.start()]))
            if match.lastgroup == "end":
                pieces.append([])
            else:
                pieces[-1].append(self._piece(match.lastgroup, match[0]))
            position = match.end()
        pieces[-1].append(fold(sql[position:]))
        self.pieces = ["".join(piece) for piece in pieces]

    def _piece(self, kind: str | None, token: str) -> str:
        if kind == "placeholder":
            return self._placeholder(token)
        if "%" in token:  # drivers fill in placeholders inside literals and comments too
            self._placeholders += sum(
                not escaped and not name for escaped, name in _PLACEHOLDER.findall(token)
            )
        if kind == "text":
            self._literals.append(token)
            return f"'{len(self._literals) - 1}'"
        if kind == "name":
            name = token[1:-1]
            if "_" in name and name.isidentifier():
                return name  # perhaps a function; no keyword of the rules has an underscore
            self._literals.append(token)
            return f'"{len(self._literals) - 1}"'
        self.has_executable_comment |= kind == "code"
        return " "

    def _placeholder(self, token: str) -> str:
        match = _PLACEHOLDER.fullmatch(token)
        if match is None or token.startswith("%%"):
            return token
        if match[2]:
            return f"%{match[2]}%"
        self._placeholders += 1
        return f"%{self._placeholders - 1}%"

    def spell(self, name: str) -> str:
        """Return a name as it is, without quotes."""
        return re.sub(r"""["'](\d+)["']""", lambda m: self._literals[int(m[1])][1:-1], name)

    def quote(self, code: str) -> str | None:
        """Return code with its literals in it, None if one of them is not simple to compare."""
        literals = [self._literals[int(index)] for index in re.findall(r"'(\d+)'", code)]
        if not all(re.fullmatch(r"""(['"])[^'"\\%]*\1""", literal) for literal in literals):
            return None
        return re.sub(r"'(\d+)'", lambda m: f"'{self._literals[int(m[1])][1:-1]}'", code)


def _long_text_has(sql: str, markers: Markers) -> bool:
    """Look for the markers in a text of which one pass of Python's own search costs 30 µs.

    The search for a single character is 50 times faster. Before the statement all of this is cold
    in the processor's caches: the fewest steps count.
    """
    for character in markers.characters:
        if character in sql:
            return True
    for word in markers.words:
        if word in (_before_from(sql) if word == "into" else sql.lower()):
            return True
    calls = markers.calls  # their names stand before one of a few parentheses
    at = sql.find("(") if calls else -1
    tries = 50
    while at >= 0:
        before = sql[at - 100 if at > 100 else 0 : at].removesuffix(" ").lower()  # names: 64
        for call in calls:
            if call in before:
                return True
        tries -= 1
        if not tries or before[-1:].isspace() or before.endswith("/"):  # a comment, perhaps
            lower = sql.lower()
            return any(call in lower for call in calls)
        at = sql.find("(", at + 1)
    return False


def _before_from(sql: str) -> str:
    """Return where a SELECT's INTO would stand (manual: before FROM), all of it where unsure."""
    at = sql.find(" FROM ", 0, SHORT_TEXT)
    if at < 0:
        return sql.lower()
    head = sql[:at].lower()
    for sign in _UNSURE:
        if sign in head:
            return sql.lower()
    return sql.lower() if head.rstrip().endswith(_UNSURE_ENDS) else head


def _as_text(sql: object) -> str | None:
    """Return the text of bytes, or of psycopg's composed SQL."""
    if isinstance(sql, bytes | bytearray | memoryview):
        return bytes(sql).decode("utf-8", "replace")
    try:
        # Not str(): the repr of psycopg.sql.Composed looks like one list of string literals.
        return str(sql.as_string(None))  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001 (the statement has run: whatever it is, it is no error now)
        return None  # psycopg2 quotes a name only for a connection; others are as opaque


@cache
def _compile(syntax: str) -> re.Pattern[str]:
    """Return the pattern of a rule, for a statement with one blank after every word."""
    pattern = f"{syntax} ".replace("... ", "(?:.* )?")
    pattern = pattern.replace("[", "(?:").replace("] ", " )?")
    pattern = pattern.replace("{", "(?:").replace("}", ")")
    pattern = re.sub(r"\bnames\b", "(.+)", pattern)
    pattern = re.sub(r"\bname\b", lambda _: NAME, pattern)
    return re.compile(pattern, re.IGNORECASE)


def _gives_back(rule: Rule | Call) -> bool:
    return bool(rule.frees or rule.frees_all)


def _without_giving_back(effect: Effect) -> Effect:
    return effect._replace(rule=effect.rule._replace(frees="", frees_all=()))


def _spaced(code: str) -> str:
    """Return code with one blank around each word and symbol, none around the dots of names."""
    spaced = _SYMBOL.sub(lambda m: {".": ".", ":=": " = "}.get(m[1], f" {m[1]} "), code)
    return " ".join(spaced.split())


def _is_plain_list(words: list[str], calls: list[tuple[int, int]]) -> bool:
    """Tell whether a statement selects the values of calls and nothing else."""
    rest: list[str] = []
    position = 0
    for start, end in calls:
        if start < position:
            return False  # one inside another
        rest += [*words[position:start], "CALL"]
        position = end
    return _PLAIN_CALLS.fullmatch(" ".join(rest + words[position:])) is not None


def _closing(words: list[str], opening: int) -> int:
    """Return the index after the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(words)):
        depth += (words[index] == "(") - (words[index] == ")")
        if not depth:
            return index + 1
    return len(words)


def _split(code: str) -> list[str]:
    """Split a list at its commas, not at those inside parentheses."""
    items: list[list[str]] = [[]]
    depth = 0
    for word in code.split(" "):
        depth += (word == "(") - (word == ")")
        if word == "," and not depth:
            items.append([])
        else:
            items[-1].append(word)
    return [" ".join(item) for item in items]


def _resolve(key: str | None, params: object) -> str | None:
    """Put parameters into the key of a lock; None if that cannot be done."""
    if key is None:
        return None
    try:
        return re.sub(r"%([^%]+)%", lambda m: _literal(params, m[1]), key)
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def _literal(params: object, name: str) -> str:
    value = params[name] if isinstance(params, Mapping) else params[int(name)]  # type: ignore[index]
    if isinstance(value, str):
        return "'{}'".format(value.replace("'", "''"))
    if type(value) is int:
        return str(value)
    raise TypeError(type(value))


NO_RULES = RuleSet(tokens=r"(?!)", quiet={}, quiet_characters="")
