"""Random programs: a class ``Net`` with methods, helpers and a forward of a dozen statements, all on ``[3, 4]`` tensors.

Every choice is drawn from one ``random.Random``, so that hypothesis can drive and shrink it.
"""

import random
from collections.abc import Callable

PRELUDE = "from tests.autoquant.program_prelude import *\n"

Block = list[str]


class Program:
    """Writes one program.

    Args:
        rng: Where every choice comes from.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.number = 0
        self.helpers: list[str] = []
        self.methods: list[str] = []
        self.tensors: list[str] = []
        self.integers: list[str] = []
        self.owned: list[str] = []
        self.functions: list[str] = []
        self.in_method = False
        self.in_forward = False

    def text(self) -> str:
        """The whole source."""
        helpers = [self._helper() for _ in range(self.rng.randint(0, 2))]
        self.in_method = True
        methods = [self._method() for _ in range(self.rng.randint(0, 2))]
        self.in_forward = True
        forward = self._function("forward", "self, x, y", 5, 9)
        members = "\n".join("    " + line for block in [*methods, forward] for line in block)
        text = "\n".join("\n".join(block) for block in helpers)
        return f"{PRELUDE}\n{text}\nclass Net(Base):\n{members}\n"

    # ------------------------------------------------------------ functions
    def _helper(self) -> Block:
        name = self.fresh("helper")
        block = self._function(name, "x, y, n=2", 1, 3, ["n"])
        decorator = self.pick(["", "", "@wrapped(2)", "@torch.no_grad()"])
        self.helpers.append(name)
        return [decorator, *block] if decorator else block

    def _method(self) -> Block:
        name = self.fresh("method")
        if self.rng.random() < 0.2:
            name = "inherited"
        block = self._function(name, "self, x" if name == "inherited" else "self, x, y", 1, 3)
        if name == "inherited":
            block.insert(1, f"    x = super().inherited({self.tensor(1, ['x'])})")
        else:
            self.methods.append(name)
        return block

    def _function(self, name: str, arguments: str, least: int, most: int, integers: list[str] | None = None) -> Block:
        names = [a.strip() for a in arguments.split(",")]
        self.tensors = [n for n in names if n in ("x", "y")]
        self.integers, self.owned, self.functions = list(integers or []), [], []
        body = self.block(self.rng.randint(least, most), 2)
        return [f"def {name}({arguments}):", *indented([*body, f"return {self.result()}"]), ""]

    def result(self) -> str:
        """What the function gives back; helpers and methods give a tensor."""
        return self.tensor(2)

    # ------------------------------------------------------------ small things
    def fresh(self, stem: str) -> str:
        """A name not used before."""
        self.number += 1
        return f"{stem}{self.number}"

    def pick(self, options: list[str]) -> str:
        """One of ``options``."""
        return self.rng.choice(options)

    def integer(self, depth: int = 1) -> str:
        """An expression of an integer."""
        leaves = [*self.integers, "1", "2", "3", "x.shape[0]", "x.dim()", f"note('i', {self.rng.randint(0, 3)})"]
        if depth == 0 or self.rng.random() < 0.6:
            return self.pick(leaves)
        return f"({self.integer(0)} {self.pick(['+', '-', '*', '//', '%', '**'])} {self.pick(['1', '2', '3'])})"

    def condition(self) -> str:
        """An expression of a truth value."""
        a, b = self.integer(0), self.integer(0)
        return self.pick(
            [
                f"{a} < {b}",
                f"{a} <= {b} != {self.integer(0)}",
                f"note('c', {a} == {b})",
                f"{a} > 1 and note('and', {b} > 0)",
                f"note('or', {a} > 2) or {b} == 3",
                f"not {a} % 2",
                "x is not None",
                "isinstance(x, torch.Tensor)",
                "float(x.detach().sum()) > 0",
            ]
        )

    def tensor(self, depth: int, names: list[str] | None = None) -> str:
        """An expression of a ``[3, 4]`` tensor."""
        names = names or self.tensors
        if depth == 0 or self.rng.random() < 0.15:
            return self.pick(names)
        a = self.tensor(depth - 1, names)
        forms: list[Callable[[], str]] = [
            lambda: f"({a} {self.pick(['+', '-', '*'])} {self.tensor(depth - 1, names)})",
            lambda: f"({a} {self.pick(['+', '-', '*', '/'])} {self.pick(['2', '0.5', '3'])})",
            lambda: f"({self.pick(['2', '1.5'])} {self.pick(['+', '-', '*'])} {a})",
            lambda: f"(-{a})",
            lambda: f"note('t', {a})",
            lambda: self.pick(
                ["torch.tanh({})", "F.relu({})", "{}.sigmoid()", "F.softmax({}, -1)", "{}.softmax(dim=0)", "F.gelu({})"]
            ).format(a),
            lambda: f"torch.where({a} > 0, {self.tensor(depth - 1, names)}, {self.pick(names)})",
            lambda: f"({a} if {self.condition()} else {self.tensor(depth - 1, names)})",
            lambda: f"(lambda t, k={self.integer(0)}: t * k + {self.pick(names)})({a})",
            lambda: f"sum([{a}, {self.tensor(depth - 1, names)}])",
            lambda: f"torch.stack([{a}, {self.pick(names)}]).mean(0)",
            lambda: f"[{a}, {self.tensor(depth - 1, names)}][{self.integer(0)} % 2]",
            lambda: f"{{'k': {a}}}['k']",
            lambda: f"recursive({a}, {self.integer(0)} % 3)",
            lambda: f"list(pieces({a}, 2))[-1]",
            lambda: f"[v * i for i, v in enumerate([{a}, {self.pick(names)}]) if i][0]",
            lambda: f"functools.reduce(lambda p, q: p + q, [{a}, {self.pick(names)}])",
            lambda: (
                f"applied({self.pick(['torch.mul', 'torch.add', 'operator.sub'])}, {a}, {self.tensor(depth - 1, names)})"
            ),
            lambda: f"ACT[{self.pick(['relu', 'tanh', 'gelu', 'own'])!r}]({a})",
            lambda: f"functools.partial(torch.add, {a}, alpha=2)({self.pick(names)})",
            lambda: f"{a}[:, [1, 0, 2, 3]].reshape(3, 2, 2).flatten(1)",
            lambda: f"torch.cat({a}.chunk(2, -1)[::-1], dim=-1)",
            lambda: f"({self.fresh_walrus()} := {a})",
        ]
        if self.in_method:
            forms += [
                lambda: f"({a} @ self.weight)",
                lambda: f"F.linear({a}, self.weight, self.bias)",
                lambda: f"torch.matmul({a}, self.doubled)",
                lambda: f"self.lin({a})",
                lambda: f"self.norm({a})",
                lambda: f"self.drop({a})",
                lambda: f"F.dropout({a}, 0.2, self.training)",
                lambda: f"applied(self.lin, {a})",
            ]
        if self.in_forward:  # elsewhere it might call itself without end
            forms.append(lambda: f"self.inherited({a})")
        forms += [lambda f=f: f"{f}({a}, {self.tensor(depth - 1, names)})" for f in self.helpers]
        forms += [lambda f=f: f"{f}({a}, y=x, n={self.integer(0)})" for f in self.helpers]
        if self.in_method:
            forms += [lambda m=m: f"self.{m}({a}, {self.pick(names)})" for m in self.methods]
        forms += [lambda f=f: f"{f}({a})" for f in self.functions]
        return self.rng.choice(forms)()

    def fresh_walrus(self) -> str:
        """A name that only its own expression binds."""
        return self.fresh("w")

    # ------------------------------------------------------------ statements
    def block(self, count: int, depth: int) -> Block:
        """``count`` statements in the scope as it is."""
        return [line for _ in range(count) for line in self.statement(depth)]

    def inner(self, count: int, depth: int, tensors: tuple[str, ...] = (), integers: tuple[str, ...] = ()) -> Block:
        """Statements in a branch: what they bind is not known afterwards."""
        kept = list(self.tensors), list(self.integers), list(self.owned), list(self.functions)
        self.tensors += tensors
        self.integers += integers
        body = self.block(count, depth)
        self.tensors, self.integers, self.owned, self.functions = kept
        return indented(body)

    def statement(self, depth: int) -> Block:
        """One statement; compound ones while ``depth`` lasts."""
        simple = [
            self.assign,
            self.assign,
            self.rebind,
            self.unpack,
            self.own,
            self.change,
            self.note,
            self.counting,
            self.container,
        ]
        compound = [
            self.branch,
            self.loop,
            self.while_loop,
            self.attempt,
            self.manager,
            self.define,
            self.match,
            self.leave,
        ]
        options = simple + compound if depth else simple
        if self.in_method:
            options = [*options, self.buffer]
        return self.rng.choice(options)(depth)

    def assign(self, depth: int) -> Block:
        name, value = self.fresh("a"), self.tensor(3)
        self.tensors.append(name)
        return [self.pick([f"{name} = {value}", f"{name}: torch.Tensor = {value}"])]

    def rebind(self, depth: int) -> Block:
        name = self.pick(self.tensors)
        return [f"{name} = {self.tensor(2)}"]

    def unpack(self, depth: int) -> Block:
        a, b = self.fresh("a"), self.fresh("b")
        lines = [f"{a}, ({b}, *_) = {self.tensor(2)}, [{self.tensor(1)}, {self.integer()}]", f"{a}, {b} = {b}, {a}"]
        self.tensors += [a, b]
        return lines

    def own(self, depth: int) -> Block:
        name = self.fresh("o")
        line = f"{name} = {self.tensor(1)}.clone()"
        self.tensors.append(name)
        self.owned.append(name)
        return [line]

    def change(self, depth: int) -> Block:
        if not self.owned:
            return self.own(depth)
        name = self.pick(self.owned)
        others = [other for other in self.tensors if other != name]
        value = self.tensor(2, others or None)
        return [
            self.pick(
                [
                    f"{name} += {value}",
                    f"{name} *= {self.integer(0)}",
                    f"{name} -= {value}",
                    f"{name}[{self.integer(0)} % 3] = {value}[0]",
                    f"{name}[:, 1:3] += {value}[:, :2]",
                    f"{name}.mul_(0.5).add_({value})",
                    f"F.relu({name}, inplace=True)",
                ]
            )
        ]

    def note(self, depth: int) -> Block:
        return [
            self.pick(
                [f"note('s', {self.tensor(2)})", f"note('n', {self.integer()})", f"assert {self.condition()}, 'no'"]
            )
        ]

    def counting(self, depth: int) -> Block:
        if self.integers and self.rng.random() < 0.5:
            return [f"{self.pick(self.integers)} {self.pick(['+=', '*=', '-='])} {self.integer(0)}"]
        name, value = self.fresh("n"), self.integer()
        self.integers.append(name)
        return [f"{name} = {value}"]

    def container(self, depth: int) -> Block:
        name, result = self.fresh("xs"), self.fresh("a")
        lines = [
            f"{name} = [{self.tensor(2)}, {self.tensor(1)}]",
            self.pick(
                [f"{name}.append({self.tensor(1)})", f"{name}[0] += {self.tensor(1)}", f"{name}[1] = {self.tensor(2)}"]
            ),
            self.pick([f"{result} = sum({name})", f"{result} = torch.stack({name}).sum(0)", f"{result}, *_ = {name}"]),
        ]
        self.tensors.append(result)
        return lines

    def buffer(self, depth: int) -> Block:
        return ["with torch.no_grad():", f"    self.seen += {self.tensor(1)}.detach().mean(0)"]

    def branch(self, depth: int) -> Block:
        lines = [f"if {self.condition()}:", *self.inner(self.rng.randint(1, 2), depth - 1)]
        if self.rng.random() < 0.3:
            lines += [f"elif {self.condition()}:", *self.inner(1, depth - 1)]
        return [*lines, "else:", *self.inner(1, depth - 1)] if self.rng.random() < 0.6 else lines

    def loop(self, depth: int) -> Block:
        i, v, out = self.fresh("i"), self.fresh("v"), self.fresh("a")
        start = f"{out} = {self.tensor(1)}"
        over = (
            self.pick([f"{i}, {v} in enumerate([x, y])", f"{i}, {v} in zip(range(2), [y, x])"])
            if "y" in self.tensors
            else f"{i}, {v} in enumerate([x, x + 1])"
        )
        body = self.inner(1, depth - 1, (v, out), (i,))
        stop, skip = [f"    if {i} == 1:", "        break"], [f"    if {i} == 0:", "        continue"]
        jump: Block = self.rng.choice([[], [], stop, skip])
        lines = [start, f"for {over}:", *jump, *body, f"    {out} = {out} + {v} * {i}"]
        self.tensors.append(out)
        return [*lines, "else:", f"    {out} = {out} * 2"] if self.rng.random() < 0.4 else lines

    def while_loop(self, depth: int) -> Block:
        n = self.fresh("n")
        return [f"{n} = 0", f"while note('w', {n} < 2):", f"    {n} += 1", *self.inner(1, depth - 1)]

    def attempt(self, depth: int) -> Block:
        lines = ["try:", *self.inner(1, depth - 1)]
        if self.rng.random() < 0.6:
            lines += [
                f"    if {self.condition()}:",
                f"        raise {self.pick(['Failed', 'ValueError'])}(f'{{x.shape[0]}}')",
            ]
        lines += [
            f"except {self.pick(['Failed', '(ValueError, Failed)', 'Exception'])} as error:",
            "    note('e', str(error))",
            *self.inner(1, depth - 1),
        ]
        if self.rng.random() < 0.4:
            lines += ["else:", *self.inner(1, depth - 1)]
        if self.rng.random() < 0.4:
            lines += ["finally:", *self.inner(1, depth - 1)]
        return lines

    def manager(self, depth: int) -> Block:
        name = self.fresh("m")
        head = self.pick(["torch.no_grad()", f"scaled({self.tensor(1)}, 2) as {name}", "contextlib.suppress(Failed)"])
        known = (name,) if head.endswith(name) else ()
        return [f"with {head}:", *self.inner(self.rng.randint(1, 2), depth - 1, known)]

    def define(self, depth: int) -> Block:
        name, kept = self.fresh("f"), (list(self.tensors), list(self.owned))
        self.tensors = ["t", *self.tensors]
        value = self.tensor(2)
        lines = [f"def {name}(t, k={self.integer(0)}):"]
        if self.integers and self.rng.random() < 0.5:
            outer = self.pick(self.integers)
            lines += [f"    nonlocal {outer}", f"    {outer} += 1"] if outer.startswith("n") and outer != "n" else []
        lines += [f"    u = {value}", "    return u * k"]
        self.tensors, self.owned = kept
        self.functions.append(name)
        return lines

    def match(self, depth: int) -> Block:
        return [
            f"match ({self.integer(0)}, {self.tensor(1)}):",
            f"    case (1 | 2, captured) if {self.condition()}:",
            *indented(self.inner(1, depth - 1, ("captured",))),
            "    case (number, *_):",
            *indented(self.inner(1, depth - 1, (), ("number",))),
        ]

    def leave(self, depth: int) -> Block:
        return [f"if {self.condition()} and {self.integer(0)} == 3:", f"    return {self.tensor(2)}"]


def indented(lines: Block) -> Block:
    """``lines`` one level further in."""
    return ["    " + line for line in lines]


def program(rng: random.Random) -> str:
    """A random program."""
    return Program(rng).text()
