"""Every statement and expression kind of Python 3.10 to 3.13, and the idioms of PyTorch code, one short program each.

A case is the body of ``Net.forward(self, x)``. Before a line of dashes may stand module-level helpers, before a line of
equals signs further members of ``Net``. ``note(tag, value)`` logs and returns ``value``.
"""

import sys
import textwrap

HEADER = """\
import asyncio, collections, contextlib, copy, dataclasses, functools, itertools, math, operator, random, typing
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
"""

BASE = """\
class Net({base}):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.lin = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(4))
        self.items = [1.0, 2.0]
        self.setup()

    def setup(self):
        pass

"""

CASES: dict[str, str] = {
    # ---------------------------------------------------------------- statements
    "assign to several targets": "a = b = note('v', x + 1)\nreturn a * b, a is b",
    "unpack": "a, (b, *c) = note('a', x * 2), [x + 1, x - 1, note('c', x)]\nreturn a + b, c",
    "starred assignment": "first, *rest, last = [x, x + 1, x * 2, x - 1]\nreturn first + last, rest",
    "annotated assignment": "y: torch.Tensor = x + 1\nz: int\nz = 3\nreturn y * z",
    "assign to attribute and subscript": "self.cache = x * 2\nd = {}\nd[note('k', 'a')] = note('v', self.cache + 1)\nreturn d",
    "augmented name": "y = x.clone()\ny += note('r', 1)\ny *= x\ny -= 2\ny /= 3\nreturn y",
    "augmented keeps the object": "y = x.clone()\nz = y\ny += 1\nreturn z, y is z",
    "augmented on integers": "n = 7\nn += 2; n -= 1; n *= 3; n //= 2; n %= 8; n **= 2; n <<= 1; n >>= 2; n |= 5; n &= 12; n ^= 9\nreturn x * n",
    "augmented on lists": "a = [x]\nb = a\na += [x + 1]\na *= 2\nreturn len(b), a is b, a",
    "augmented on strings and sets": "s = 'a'\ns += 'b'\nt = {1}\nt |= {2}\nreturn s, sorted(t), x + len(s)",
    "augmented attribute": "self.count += note('r', 1)\nself.total = x * 1\nself.total += x\nreturn self.total * self.count",
    "augmented subscript": "y = [x * 1, x + 1]\ny[note('i', 0)] += note('v', x)\nz = x.clone()\nz[note('j', 0)] *= 2\nz[..., 1:3] -= 1\nreturn y, z",
    "augmented subscript of a call": (
        "def store():\n    note('store')\n    return box\nbox = {'a': x * 1}\nstore()[note('key', 'a')] += note('value', x)\nreturn box"
    ),
    "augmented matmul": "y = x.clone()\ny @= self.weight\nreturn y",
    "augmented right side changes the left": "y = x.clone()\ny += (y.mul_(2))\nreturn y",
    "delete": "y = x + 1\nd = {'a': y}\ndel y, d['a']\nself.z = x * 2\ndel self.z\ntry:\n    y\nexcept NameError as e:\n    return str(e), x * 1, d",
    "for and else": "t = x * 0\nfor i in note('it', range(3)):\n    t = t + note('b', x * i)\nelse:\n    t = t - note('e', x)\nreturn t",
    "for, break and continue": "t = x\nfor i in range(6):\n    if i == 1:\n        continue\n    if i == 4:\n        break\n    t = t * 2 + i\nelse:\n    t = t * 0\nreturn t, i",
    "for over tensors": "t = x.sum()\nfor row in x:\n    t = t + row.mean()\nfor a, b in zip(x, self.weight):\n    t = t + (a * b).sum()\nreturn t",
    "nested loops": "t = x\nfor i in range(2):\n    for j, k in enumerate([x, x + 1]):\n        t = t + k * i * j\nreturn t",
    "loop target is an attribute": "for self.last in [x, x + 1]:\n    note('last', self.last)\nreturn self.last * 2",
    "while and else": "n = 0\ny = x\nwhile note('c', n < 3):\n    y = y + n\n    n += 1\nelse:\n    y = y * 2\nreturn y",
    "while with walrus": "n = 5\ny = x\nwhile (m := n - 1) > 0:\n    y = y * 0.5 + m\n    n = m\nreturn y, m",
    "if, elif and else": "if note('a', x.sum() > 1e9):\n    y = x\nelif note('b', x.dim() == 2):\n    y = x * 2\nelse:\n    y = x * 3\nreturn y",
    "with": "with torch.no_grad() as g, contextlib.nullcontext(x + 1) as y:\n    z = y * 2\nreturn z + x",
    "with in parentheses": "with (\n    contextlib.nullcontext(note('a', x * 2)) as a,\n    contextlib.nullcontext((x, [a])) as (b, [c]),\n):\n    y = a + b + c\nreturn y",
    "conditions on lines of their own": (
        "if (\n    note('a', x.dim()\n    == 2)\n):\n    for i in (\n        range(2)\n    ):\n        while (\n            i < 1\n        ):\n"
        "            i += 1\n            x = x * 2\nassert (\n    i\n)\nreturn x"
    ),
    "match on a line of its own": "match (\n    note('m', x.dim())\n):\n    case 2:\n        return x * 2",
    "with that swallows": "with contextlib.suppress(ValueError):\n    note('in', x + 1)\n    raise ValueError('gone')\nreturn x * 2",
    "with a user's manager": (
        "class Manager:\n    def __enter__(self):\n        note('enter')\n        return 3\n"
        "    def __exit__(self, *error):\n        note('exit', str(error[0]))\n        return False\n---\n"
        "with Manager() as m:\n    y = x * m\nreturn y"
    ),
    "a generator as context manager": (
        "@contextlib.contextmanager\ndef scaled(x):\n    note('before')\n    try:\n        yield x * 2 + 1\n    finally:\n        note('after')\n---\n"
        "with scaled(x) as y:\n    z = y * y\nreturn z"
    ),
    "raise": "y = x + 1\nif y.dim() == 2:\n    raise ValueError(f'no {y.shape}')\nreturn y",
    "raise from": "try:\n    (x + 1)['a']\nexcept Exception as e:\n    raise KeyError('other') from e",
    "raise again": "try:\n    x @ torch.ones(7)\nexcept RuntimeError:\n    note('seen')\n    raise",
    "assert": "assert x.dim() == 2, note('message', 'wrong')\nassert (x * 0).sum() == 1, f'failed {x.shape}'\nreturn x",
    "try and except": "try:\n    y = x @ torch.ones(9, 9)\nexcept (RuntimeError, ValueError) as e:\n    y = x * 2\nelse:\n    y = x * 3\nfinally:\n    note('finally')\nreturn y",
    "try and else": "try:\n    y = x * 2\nexcept RuntimeError:\n    y = x\nelse:\n    y = y + note('else', 1)\nfinally:\n    y = y * 1.5\nreturn y",
    "return in finally": "def f():\n    try:\n        return note('try', x * 1)\n    finally:\n        note('finally')\nfor i in range(2):\n    try:\n        continue\n    finally:\n        note('loop', i)\nreturn f()",
    "nested exceptions": "try:\n    try:\n        raise KeyError('a')\n    except KeyError:\n        raise ValueError('b')\nexcept ValueError as e:\n    return repr(e.__context__), x + 1",
    "imports": "import math as m\nfrom os import path as p, sep\nfrom torch.nn import functional as G\nreturn G.relu(x) * m.pi, p.basename('a/b'), sep",
    "try to import": "try:\n    from nowhere_at_all import fast\nexcept ImportError:\n    fast = None\nreturn x + 1 if fast is None else fast(x)",
    "global": "STATE = 0\n---\nglobal STATE\nSTATE += 1\nreturn x * STATE",
    "nonlocal": "n = 1\ny = x\ndef step():\n    nonlocal n, y\n    n += 1\n    y = y * n\n    return y + 1\nz = step() + step()\nreturn z, y, n",
    "pass and constants": "pass\n...\n'text'\nNone\nreturn x * 1 + True",
    "several statements on a line": "y = x + 1; z = y * 2; note('z', z); return z",
    "docstring": "'''What it does.'''\nreturn x + 1",
    "match literals": "match note('s', x.dim()):\n    case 1 | 3:\n        y = x\n    case 2 if note('g', x.shape[0] == 3):\n        y = x * 2 + 1\n    case _:\n        y = x * 3\nreturn y",
    "match sequences": "out = []\nfor v in ([x, 1], (x, x, x), [x], 'no'):\n    match v:\n        case [a, int(n)]:\n            out.append(a * n)\n        case (a, *rest):\n            out.append(a + len(rest))\n        case _:\n            out.append(None)\nreturn out",
    "match mappings": "match {'x': x, 'k': 2, 'l': 3}:\n    case {'x': y, 'k': k, **rest}:\n        z = y * k + rest['l']\nreturn z",
    "match classes": "@dataclasses.dataclass\nclass P:\n    a: object\n    b: int = 2\n---\nmatch P(x):\n    case P(a=torch.Tensor() as t, b=2 | 3 as n):\n        return t * n\nreturn x",
    "match captures": "match (x, None):\n    case (t, None):\n        t = t * 2\n    case other:\n        t = other\nreturn t + 1",
    "early return": "if x.dim() == 2:\n    return x * 2\ny = x + 1\nreturn y",
    "no return": "note('y', x + 1)",
    "return a tuple": "return x, *[x + 1, x * 2], {'a': x - 1}",
    # ---------------------------------------------------------------- expressions
    "binary operators on tensors": "i = (x * 3).int()\nreturn x + 1, 1 - x, x * x, x / 2, x.detach() // 1, x % 2, x ** 2, 2 ** x, x @ self.weight, i & 3, i | 1, i ^ 2, i << 1, i >> 1",
    "binary operators on integers": "n = x.shape[0]\nreturn n + 1, n - 1, n * 2, n / 2, n // 2, n % 2, n ** 2, n & 1, n | 4, n ^ 3, n << 2, n >> 1, x * n",
    "binary operators on others": "return [1] + [2], (1,) * 2, 'a' + 'b', '%s' % 'c', {1} | {2}, {1: 2} | {3: 4}, True ^ True, b'a' + b'b', x + 0",
    "unary operators": "n = x.shape[0]\nb = x > 0\nreturn -x, +x, ~b, not n, -n, +n, ~n, -(-x)",
    "boolean operators": "f = lambda tag, v: note(tag, v)\ny = f('a', None) or f('b', 0) or f('c', x.shape[0]) or f('d', 9)\nz = f('e', 1) and f('g', '') and f('h', 3)\nreturn y, z, x * 1",
    "comparison chain": "n = x.shape[0]\nreturn note('a', 1) < note('b', n) <= note('c', 3) != note('d', 4), note('e', 3) < note('f', 2) < note('g', 1), x * 1",
    "comparisons": "y = x\nreturn x > 0, x >= 0, x == y, x != 0, x is y, x is not None, 1 in [1, 2], 'a' not in 'bc', x.shape == (3, 4)",
    "conditional expression": "y = note('a', x + 1) if note('c', x.dim() == 2) else note('b', x - 1)\nreturn y * (2 if y is None else 3)",
    "walrus": "if (n := x.shape[0]) > 1 and (y := note('y', x * n)) is not None:\n    return y + (z := n * 2), z\nreturn x",
    "walrus in a comprehension": "ys = [last := x * i for i in range(3) if (k := i) > 0]\nreturn ys, last, k",
    "list comprehension": "return [note('e', v * i) for i, v in enumerate([x, x + 1, x * 2]) if note('c', i % 2 == 0)]",
    "nested comprehension": "return [[a * b + c for a in (1, 2)] for b in (x, x * 2) for c in range(2) if c]",
    "set and dict comprehension": "return {i: x * i for i in range(3)}, {n * 2 for n in range(3)}, {k: v + 1 for k, v in {'a': x}.items()}",
    "generator expression": "return sum(x * i for i in range(3)), max((x * i).sum() for i in range(2)), list(v + 1 for v in (x,))",
    "comprehension scope": "y = 5\nys = [y * x for y in range(2)]\nreturn ys, y, [lambda: x * k for k in (1, 2)][0]()",
    "comprehension over a quantized name": "y = x * 2\nz = y + 1\nreturn [z * i for i in range(2)], {z.dim()}",
    "lambda": "f = lambda a, b=x + 1, *c, d=2, **e: a * b + d + len(c) + len(e)\nreturn f(x), f(x, 2, 3, d=4, q=5), (lambda: x - 1)()",
    "call with stars": "def f(a, b, *c, k=1, **kw):\n    return a + b * k + len(c), sorted(kw)\nreturn f(*[x, 2], *(3,), k=2, **{'p': 1}, **dict(q=2))",
    "order of call arguments": "def f(*a, **k):\n    return a[0] + a[1] + k['c']\nreturn note('f', f)(note('1', x), *note('2', [x + 1]), c=note('3', x * 2), **note('4', {}))",
    "operator called with stars": "a = (x, self.weight)\nk = {'bias': None}\nreturn torch.matmul(*a), F.linear(*a, **k), torch.cat([*a], **{'dim': 0})",
    "attribute chain": "return self.lin.weight.T.contiguous().shape, (x @ self.lin.weight.T).mT.reshape(-1).sum()",
    "subscript and slice": "return x[0], x[:, 1:3], x[..., -1], x[None, :2], x[x > 0], x[[0, 1]], x[:, ::2], x[1:, torch.tensor([0])]",
    "order in subscript": "return note('v', x)[note('a', 0) : note('b', 2), note('c', 1)]",
    "starred subscript": "i = (0, 1)\nreturn x[(*i,)]",
    "list, tuple, dict, set": "return [x + 1, *[x]], (x * 2,), {**{'a': x}, 'b': x - 1}, {1, *[2]}",
    "f-string": "n = 3\ny = x * n\nreturn f'{n} {n!r:>4} {x.shape[0] + 1} {n=} {y.dim() * 2:{n}d} {{}}', y",
    "f-string evaluates": "return f'{note(\"a\", x.shape[0])}{note(\"b\", (x * 2).shape)}', x * 1",
    "implicit string": "return 'a' 'b' f'{x.dim()}', b'c', 1j, 1e3, 0x10, ..., x + 1",
    "yield": "def g(n):\n    for i in range(n):\n        got = yield x * i\n        note('got', got)\n    return x + 1\nit = g(3)\nout = [next(it), it.send(5)]\nout += list(it)\nreturn out",
    "yield from": "def g():\n    yield x + 1\n    return x * 2\ndef h():\n    r = yield from g()\n    yield r * 3\nreturn list(h())",
    "generator closed early": "def g():\n    try:\n        yield x * 1\n        yield x * 2\n    finally:\n        note('closed')\nit = g()\ny = next(it)\nit.close()\nreturn y",
    "await": "async def f(y):\n    note('f')\n    await asyncio.sleep(0)\n    return y * 2 + 1\nasync def g():\n    return await f(x) + await f(x + 1)\nreturn asyncio.run(g())",
    "async for and with": (
        "class A:\n    async def __aenter__(self):\n        note('in')\n        return 2\n    async def __aexit__(self, *e):\n        note('out')\n"
        "async def numbers():\n    for i in range(3):\n        yield i\n---\n"
        "async def f():\n    y = x\n    async with A() as n:\n        async for i in numbers():\n            y = y * n + i\n"
        "    return y, [x * i async for i in numbers() if i], {i: x + i async for i in numbers()}\nreturn asyncio.run(f())"
    ),
    # ---------------------------------------------------------------- functions and classes
    "nested function with defaults": "def f(a, /, b=note('d', 2), *, c=x + 1):\n    '''Doc.'''\n    return a * b + c\nreturn f(x), f(x, 3, c=1), f.__doc__, f.__name__, f.__qualname__",
    "nested function, annotated": "def f(a: torch.Tensor, n: int = 2) -> torch.Tensor:\n    return a * n\nreturn f(x), sorted(f.__annotations__)",
    "nested decorator": "def deco(f):\n    @functools.wraps(f)\n    def inner(*a, **k):\n        note('deco')\n        return f(*a, **k) * 2\n    return inner\n@deco\ndef g(y):\n    return y + 1\nreturn g(x), g.__name__",
    "nested class": "class Box:\n    scale = 2\n    def __init__(self, v):\n        self.v = v * self.scale\n    def get(self):\n        return self.v + 1\n    def __add__(self, o):\n        return Box(self.v + o)\nb = Box(x) + 1\nreturn b.get(), Box.__qualname__",
    "lambda as forward": "class Inner(nn.Module):\n    forward = lambda self, x: [F.relu(y + 1) for y in (lambda z: [z, z * 2])(x)]\n---\ndef setup(self):\n    self.inner = Inner()\n===\nreturn self.inner(x), self.inner(x - 1)",
    "closures bind late": "fs = [lambda: x * i for i in range(3)]\nreturn [f() for f in fs]",
    "closure over a changed name": "y = x * 1\ndef f():\n    return y * 2\na = f()\ny = x + 1\nreturn a, f()",
    "recursion": "def f(y, n):\n    return y if n == 0 else f(y * 0.5 + n, n - 1)\nreturn f(x, 3)",
    "recursive helper": "def power(x, n):\n    if n == 0:\n        return torch.ones_like(x)\n    return note('p', x * power(x, n - 1))\n---\nreturn power(x, 3)",
    "mutual recursion": "def even(x, n):\n    return x if n == 0 else odd(x + 1, n - 1)\ndef odd(x, n):\n    return even(x * 2, n - 1) if n else x\n---\nreturn even(x, 4)",
    "generator helper": "def pairs(x):\n    for i in range(2):\n        y = x * i\n        yield i, y + 1\n---\nreturn [(i, v * 2) for i, v in pairs(x)]",
    "helper with stars": "def f(*args, scale=1.0, **kwargs):\n    y = args[0] * scale\n    for a in args[1:]:\n        y = y + a\n    return y, sorted(kwargs)\n---\nreturn f(x, x + 1, scale=2, other=3)",
    "helper called twice": "def f(x, n=2):\n    y = x * n\n    return y + 1\n---\nreturn f(f(x)), f(x, n=3)",
    "helper without wraps": "def deco(f):\n    def inner(*a):\n        note('deco')\n        return f(*a)\n    return inner\n@deco\ndef g(x):\n    return x * 2 + 1\n---\nreturn g(x)",
    "helper with wraps": "def deco(n):\n    def outer(f):\n        @functools.wraps(f)\n        def inner(*a, **k):\n            return f(*a, **k) * n\n        return inner\n    return outer\n@deco(2)\n@deco(3)\ndef g(x):\n    return x + 1\n---\nreturn g(x), g.__wrapped__(x)",
    "no_grad helper": "@torch.no_grad()\ndef g(x):\n    return x * 2\n---\nreturn g(x) + x",
    "forward under no_grad": "@torch.no_grad()\ndef inner(self, x):\n    return self.lin(x) * 2\n===\nreturn self.inner(x) + self.lin(x)",
    "autocast": "with torch.autocast('cpu', dtype=torch.bfloat16):\n    y = self.lin(x)\n    z = x @ self.weight\nreturn y, z",
    "lru_cache": "@functools.lru_cache(maxsize=None)\ndef table(n):\n    note('made', n)\n    return torch.arange(float(n)) * 2\n---\nreturn x * table(4) + table(4), table.cache_info().hits > 0",
    "checkpoint": "def block(x, w):\n    return F.gelu(x @ w) + 1\n---\nreturn checkpoint(block, x, self.weight, use_reentrant=False)",
    "checkpoint of a method": "def block(self, x):\n    return self.drop(F.relu(self.lin(x)))\n===\nreturn checkpoint(self.block, x, use_reentrant=False) + checkpoint(self.lin, x, use_reentrant=False)",
    "map, filter, reduce": "ys = list(map(lambda t: t * 2 + 1, [x, x - 1]))\nreturn functools.reduce(lambda a, b: a + b, ys), list(filter(lambda t: t.dim() == 2, ys))",
    "sorted by a key": "ys = sorted([x, x * 2, x - 1], key=lambda t: float((t * 2).sum()))\nreturn ys",
    "partial": "def f(a, b, c=1):\n    return a * b + c\n---\ng = functools.partial(f, x, c=2)\nreturn g(3), functools.partial(torch.add, alpha=2)(x, x)",
    "function from a registry": "def sq(x):\n    return x * x\nACT = {'relu': F.relu, 'sq': sq, 'mod': nn.GELU()}\n---\nreturn [ACT[k](x) for k in sorted(ACT)]",
    "function as argument": "def apply(f, x, *a):\n    return f(x, *a) + 1\n---\nreturn apply(torch.mul, x, 2), apply(F.softmax, x, -1), apply(lambda t: t * 3, x), apply(self.lin, x)",
    "getattr": "return getattr(torch, 'relu')(x), getattr(self, 'lin')(x), getattr(x, 'sum')(), operator.add(x, 1), operator.attrgetter('lin')(self)(x)",
    "callable object": "class Scale:\n    def __init__(self, n):\n        self.n = n\n    def __call__(self, x):\n        return x * self.n + 1\nscale = Scale(2)\n---\nreturn scale(x)",
    "operators of a user's class": "class V:\n    def __init__(self, t):\n        self.t = t\n    def __mul__(self, o):\n        note('mul')\n        return V(self.t * o)\n    def __getitem__(self, i):\n        return self.t[i] + 1\n    def __iter__(self):\n        return iter([self.t, self.t + 1])\n    def __len__(self):\n        return 2\n    def __iadd__(self, o):\n        self.t = self.t + o\n        return self\n---\nv = V(x) * 2\nv += 1\na, b = v\nreturn v[0], a + b, len(v)",
    "namedtuple": "class P(typing.NamedTuple):\n    a: torch.Tensor\n    b: int\n---\np = P(x * 2, 3)\nreturn p.a * p.b, p._replace(b=1)",
    "dataclass output": "@dataclasses.dataclass\nclass Out:\n    y: torch.Tensor\n    n: int = 0\n---\nout = Out(self.lin(x), n=2)\nreturn out.y * out.n, dataclasses.replace(out, n=5).n",
    # ---------------------------------------------------------------- modules
    "methods": "def f(self, x, n=2):\n    return self.g(x) * n\ndef g(self, x):\n    return x + self.weight[0]\n===\nreturn self.f(x), self.f(x, n=3)",
    "private names": "def __hidden(self, x):\n    return x * self.__n\ndef setup(self):\n    self.__n = 3\n===\n__y = self.__hidden(x)\nreturn __y + 1",
    "property": "@property\ndef scaled(self):\n    note('read')\n    return self.weight * 2\n@scaled.setter\ndef scaled(self, v):\n    note('set')\n===\nself.scaled = 3\nreturn x @ self.scaled",
    "class and static methods": "K = 2\n@classmethod\ndef c(cls, x):\n    return x * cls.K\n@staticmethod\ndef s(x, n=1):\n    return x + n\n===\nreturn self.c(x), self.s(x), type(self).s(x, 2), Net.c(x)",
    "cached_property": "@functools.cached_property\ndef table(self):\n    note('made')\n    return torch.ones(4) * 2\n===\nreturn x * self.table + self.table",
    "super": "class Base(nn.Module):\n    def forward(self, x):\n        note('base')\n        return x * 2 + 1\n    def extra(self, x):\n        return x - 1\n+++\ndef extra(self, x):\n    return super().extra(x) * 2\n===\nreturn super().forward(x) + self.extra(x) + super(Net, self).extra(x)",
    "diamond": "class A(nn.Module):\n    def f(self, x):\n        return x + 1\nclass B(A):\n    def f(self, x):\n        note('B')\n        return super().f(x) * 2\nclass C(A):\n    def f(self, x):\n        note('C')\n        return super().f(x) * 3\nclass Base(B, C):\n    pass\n+++\nreturn self.f(x)",
    "mixin": "class Mixin:\n    def mixed(self, x):\n        return self.scale(x) + 1\n    def scale(self, x):\n        return x * 3\nclass Base(nn.Module, Mixin):\n    pass\n+++\nreturn self.mixed(x)",
    "module called several times": "def setup(self):\n    self.act = nn.ReLU()\n===\ny = self.act(self.lin(x))\nreturn self.act(self.lin(y) + x)",
    "shared module": "def setup(self):\n    self.a = nn.Sequential(self.lin, nn.ReLU())\n    self.b = nn.ModuleList([self.lin, nn.Linear(4, 4)])\n===\ny = self.a(x)\nfor layer in self.b:\n    y = layer(y)\nreturn y",
    "containers of modules": "def setup(self):\n    self.d = nn.ModuleDict({'a': nn.Linear(4, 4), 'b': nn.ReLU()})\n    self.p = nn.ParameterList([torch.randn(4, 4)])\n===\ny = x\nfor name, m in self.d.items():\n    y = m(y) + len(name)\nreturn y @ self.p[0], [n for n, _ in self.named_children()], len(list(self.children()))",
    "parameter read several times": "return F.linear(x, self.weight), x @ self.weight, x * self.weight[0], self.weight.sum()",
    "dropout": "y = self.drop(x)\nz = F.dropout(x, 0.3, self.training)\nreturn y + z + torch.rand_like(x)",
    "buffer changed": "with torch.no_grad():\n    self.count += x.detach().mean(0)\n    self.count.mul_(0.9)\nreturn x * self.count",
    "in place on views": "y = x.clone()\nv = y[0]\nv += 1\ny[:, 1].mul_(2)\nz = y.view(-1)\nz[3] = 7.0\nreturn y, v",
    "in place methods": "y = x.clone()\nz = y.add_(1).mul_(2)\nF.relu(y, inplace=True)\nreturn y, z is y",
    "in place then used": "y = x * 2\ny += 1\nz = y @ self.weight\ny *= 2\nreturn z, y",
    "helpers that change their argument": (
        "def add(t):\n    t += 1\n    return t * 2\ndef method(t):\n    t.add_(1)\n    return t * 2\n"
        "def item(t):\n    t[0] = 5.0\n    return t * 2\ndef flag(t):\n    u = F.relu(t, inplace=True)\n    return u * 2\n---\n"
        "ys = [x.detach().clone() for _ in range(4)]\nreturn [f(y) for f, y in zip([add, method, item, flag], ys)], ys"
    ),
    "order of operands": "return note('a', x) + note('b', x * 2) - note('c', x) @ note('d', self.weight)",
    "out argument": "y = torch.empty(3, 4)\nwith torch.no_grad():\n    torch.add(x, 1, out=y)\nreturn y * 2 + x",
    "setitem": "y = torch.zeros(3, 4)\ny[0] = x[0] * 2\ny[:, 1:3] = x[:, 1:3] + 1\nreturn y",
    "leaf changed under no_grad": "with torch.no_grad():\n    self.weight.mul_(0.5)\nreturn x @ self.weight",
    "aliases": "y = x * 2\nz = y\ny = y + 1\nreturn z, y",
    "identity": "def f(q, k, v):\n    if k is v:\n        note('kv')\n        if q is k:\n            note('qkv')\n            return q @ self.weight\n    return q @ self.weight + k\nreturn f(x, x, x), f(x, x, x + 1)",
    "None and numbers": "def f(x, mask=None, scale=None):\n    y = x if mask is None else x * mask\n    return y * scale if scale else y + 1\n---\nreturn f(x), f(x, None, 2), f(x, x > 0, 0.5), f(x, scale=x.shape[-1] ** -0.5)",
    "shapes": "b, d = x.shape\nh = d // 2\ny = x.view(b, -1, h).transpose(1, 2).reshape(b * h, -1)\nreturn y, x.size(0) + 1, -x.size(-1), x.numel() / 2",
    "sizes are tuples": "return x.shape + (1,), x.shape[:-1] + (2, 2), torch.zeros(x.shape[:1] + (2,)) + 1, x.new_zeros(*x.shape)",
    "tensor methods": "return x.softmax(-1), x.matmul(self.weight), x.relu().sum(dim=-1, keepdim=True), x.masked_fill(x > 0, 1.0), x.flatten().mean()",
    "methods called on the class": "return torch.Tensor.matmul(x, self.weight), torch.Tensor.add(x, 1), nn.Module.__call__(self.lin, x)",
    "functional and method aliases": "return torch.relu(x), F.relu(x), nn.ReLU()(x), x.relu(), torch.nn.functional.gelu(x)",
    "integer tensors": "i = torch.arange(3) + 1\nj = i * 2 - 1\nreturn x[j.clamp(max=2)], i // 2, x * i[:, None]",
    "boolean tensors": "m = (x > 0) & (x < 1) | ~(x > -1)\nreturn x * m, m ^ m, torch.where(m, x, -x)",
    "tensors in containers": "d = {'a': x * 2, 'b': [x + 1, (x - 1,)]}\nd['b'][0] = d['b'][0] * 3\nxs = [x]\nxs.append(x * 2)\nxs.extend([x + 1])\nreturn d, torch.stack(xs).sum(0), torch.cat(xs, 1)",
    "einsum and stack": "a, b = x.unbind(0)[0], x.chunk(2, -1)[0]\nreturn torch.einsum('i,j->ij', a, b[:, 0]), torch.stack([a, a + 1]), torch.einsum('bi,ij->bj', [x, self.weight])",
    "custom autograd function": "class Double(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x, n):\n        note('forward')\n        ctx.n = n\n        return x * n\n    @staticmethod\n    def backward(ctx, g):\n        note('backward')\n        return g * ctx.n * 10, None\n---\nreturn Double.apply(x, 2) + 1",
    "hooks": "def setup(self):\n    self.lin.register_forward_hook(lambda m, a, o: o * 2)\n    self.lin.register_forward_pre_hook(lambda m, a: (a[0] + 1,))\n===\nreturn self.lin(x)",
    "tensor hook": "y = x * 2\ny.register_hook(lambda g: g * 3)\nreturn y + 1",
    "instance attribute changed": "self.calls = getattr(self, 'calls', 0) + 1\nself.items.append(2.0)\nself.items[0] *= 2\nreturn x * self.calls + sum(self.items)",
    "forward with keyword only": "def go(self, x, *, scale=2.0, **more):\n    return x * scale, sorted(more)\n===\nreturn self.go(x), self.go(x, scale=1, k=2)",
    "overloads": "@typing.overload\ndef f(x: int) -> int: ...\n@typing.overload\ndef f(x: torch.Tensor) -> torch.Tensor: ...\ndef f(x):\n    return x + 1\n---\nreturn f(x), f(1)",
    "jit decorators": "@torch.jit.ignore\ndef f(x):\n    return x * 2\n@torch.jit.unused\ndef g(x):\n    return x + 1\n---\nreturn f(x) + g(x)",
    "random": "if random.random() > 2:\n    return x\nreturn x + random.random() + torch.randn(1) * torch.rand(())",
    "float to tensor": "return x + float(x.shape[0]) * 0.5, torch.tensor(2.0) * x, torch.full((2,), 3.0) / 2, int(x.shape[0] * 1.5)",
    "complex numbers": "z = torch.complex(x, x * 2)\nreturn torch.view_as_real(z * z), z.abs()",
    "half precision": "y = x.to(torch.bfloat16) * 2\nreturn y.float() + 1, x.half().float() * 2, x.double() * 2",
    "print and repr": "note('r', repr(x.shape))\nreturn x + 1, str(type(self).__name__), isinstance(self, Net), type(self).__qualname__",
    # ---------------------------------------------------------------- introspection
    "locals": "y = x + 1\nz = 3\nreturn sorted(k for k in locals()), sorted(vars())",
    "locals in a helper": "def f(a, b=2):\n    c = a * b\n    return sorted(locals()), c\n---\nreturn f(x)",
    "dir and globals": "return 'nn' in globals(), sorted(n for n in dir() if not n.startswith('__')), x * 1",
    "frame": "import sys\nf = sys._getframe()\nreturn f.f_code.co_name, f.f_lineno, x * 1",
    "traceback in a helper": "def f(x):\n    y = x * 2\n    return y @ torch.ones(7)\n---\nreturn f(x + 1)",
    "traceback in a method": "def f(self, x):\n    return (\n        x\n        + torch.ones(5)\n    )\n===\ny = self.lin(x)\nreturn self.f(y)",
    "traceback of calls over several lines": "def f(self, x, *a):\n    return torch.ones(7) @ x\n===\nif note('c', x.shape[0]) > 3:\n    x = (\n        self\n        .f(\n            x, *()\n        )\n    )\nreturn (\n    self\n    .f(\n        note(\n            'v', x\n        )\n    )\n)",
    "traceback in a comprehension": "return [v @ torch.ones(7) for v in [x * 1]]",
    "name error": "y = x + 1\nreturn y * undefined_name",
    "unbound local": "if x.dim() == 9:\n    y = x + 1\nreturn y * 2",
    "attribute error": "return x + self.nothing_here",
    "type error": "return F.linear(x, self.weight, wrong=1)",
    "signature error": "def f(a, b):\n    return a + b\n---\nreturn f(x)",
    "index error": "return x[9] + 1",
    "user's exception": "class Mine(Exception):\n    pass\n---\ntry:\n    raise Mine(x.shape[0] + 1)\nexcept Mine as e:\n    raise Mine(e.args[0] * 2)",
    "stop iteration": "return next(iter([])) + x",
    "recursion error": "def f(x):\n    return f(x) + 1\n---\nimport sys\ntry:\n    f(x)\nexcept RecursionError as e:\n    return 'deep', x + 1",
    "source of the method": "import inspect\nreturn inspect.getsource(type(self).forward), str(inspect.signature(type(self).forward)), x + 1",
    "source of a helper": "import inspect\ndef f(x, n=1):\n    return x * n\n---\nreturn inspect.getsource(f), str(inspect.signature(f)), f.__defaults__, f(x)",
}  # fmt: skip

NEWER: dict[tuple[int, int], dict[str, str]] = {
    (3, 11): {
        "except star": "try:\n    raise ExceptionGroup('g', [ValueError(x.shape[0]), KeyError('k')])\nexcept* ValueError as e:\n    y = x * 2\n    note('v', str(e.exceptions))\nexcept* KeyError:\n    z = x + 1\nreturn y, z",
        "starred index": "i = (0, 1)\nreturn x[*i], x[*i[:1], 1:]",
        "starred index in an assignment": "y = x.clone()\ni = (0,)\ny[*i] += 1\nreturn y",
    },
    (3, 12): {
        "type parameters": "def first[T](v: list[T]) -> T:\n    return v[0]\n---\nreturn first([x * 2]) + 1",
        "type alias": "type Pair = tuple[torch.Tensor, int]\np: Pair = (x * 2, 1)\nreturn p[0] + p[1]",
        "generic class": "class Box[T]:\n    def __init__(self, v: T):\n        self.v = v\n    def get(self) -> T:\n        return self.v\n---\nreturn Box(x * 2).get() + 1",
        "nested quotes in f-strings": "d = {'a': 2}\nreturn f'{d['a']} {f'{d['a'] + 1}'}', x * d['a']",
    },
    (3, 13): {
        "default of a type parameter": "def f[T = int](v: T) -> T:\n    return v\n---\nreturn f(x * 2) + 1",
    },
}  # fmt: skip


def source(case: str) -> str:
    """The whole program of a case: imports, helpers, and a class ``Net``."""
    helpers, base = "", "nn.Module"
    if "\n+++\n" in case:
        helpers, case = case.split("\n+++\n")
        base = "Base"
    elif "\n---\n" in case:
        helpers, case = case.split("\n---\n")
    members, body = case.split("\n===\n") if "\n===\n" in case else ("", case)
    forward = f"def forward(self, x):\n{textwrap.indent(body, '    ')}"
    inside = textwrap.indent(f"{members}\n\n{forward}\n" if members else f"{forward}\n", "    ")
    return f"{HEADER}\n\n{helpers}\n\n\n{BASE.format(base=base)}{inside}"


def available() -> dict[str, str]:
    """The programs that this Python can compile."""
    newer = {
        name: case for version, cases in NEWER.items() if sys.version_info >= version for name, case in cases.items()
    }
    return {name: source(case) for name, case in {**CASES, **newer}.items()}
