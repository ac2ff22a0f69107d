"""Optimised HLO text as data: computations, loops with their trip counts, costs of instructions."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_NO_TRAFFIC = (
    "parameter constant tuple get-tuple-element bitcast while conditional call call-update iota "
    "opt-barrier partition-id replica-id after-all"
).split()


class Op(NamedTuple):
    """One instruction: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses
    attributes: str
    root: bool

    def called(self, *keys: str) -> list[str]:
        """Computations named as `key=%a` or `key={%a, %b}`."""
        lists = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [name for names in lists for name in re.findall(r"[\w.\-]+", names)]

    def attribute(self, pattern: str) -> str:
        """First group of `pattern` in the attributes, empty when there is none."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


class HloModule(dict[str, dict[str, Op]]):
    """Computations by name; each holds its instructions by name, in order."""

    def __init__(self, text: str):
        self.entry = ""
        current: dict[str, Op] = {}
        text = re.sub(r"=\{\n([^\n]*)\n\}", r"={\1}", text)  # what kernels say of themselves
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
                self[head[2]] = current = {}
                self.entry = head[2] if head[1] else self.entry
            elif part := re.match(
                r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)\)(.*)", line
            ):
                root, name, kind, opcode, inside, attributes = part.groups()
                operands = tuple(re.findall(r"%([\w.\-]+)", inside))
                current[name] = Op(name, kind, opcode, operands, inside, attributes, bool(root))
        self._started = {
            name
            for ops in self.values()
            for op in ops.values()
            if op.opcode in ("call-start", "async-start")
            for name in op.called("calls", "to_apply")
        }
        if not self.entry:
            raise ValueError("text has no ENTRY computation: pass what compiled.as_text() returns")

    def root(self, where: str) -> Op:
        return next(op for op in self[where].values() if op.root)

    def executed(
        self, where: str, times: int = 1, fused: bool = False
    ) -> Iterator[tuple[int, bool, str, Op]]:
        """Every instruction: how often it runs, whether inside a fusion, in which computation."""
        for op in self[where].values():
            yield times, fused, where, op
            if op.opcode == "while":
                trips = self.trip_count(where, op)
                yield from self.executed(
                    op.called("body")[0], times * (1 if trips is None else trips), fused
                )
            elif op.opcode == "conditional":
                branches = op.called("branch_computations", "true_computation", "false_computation")
                yield from self.executed(max(branches, key=self._flops_within), times, fused)
            elif op.opcode in ("fusion", "custom-call", "call", "call-start", "async-start"):
                inside = fused or op.opcode in ("fusion", "custom-call")
                for name in op.called("calls", "to_apply", "called_computations"):
                    yield from self.executed(name, times, inside)

    def _flops_within(self, where: str) -> int:
        return sum(n * self.matmul_flops(place, op) for n, _, place, op in self.executed(where))

    def calls(self, where: str, target: str) -> bool:
        return any(f'custom_call_target="{target}"' in op.attributes for op in self[where].values())

    def starts_async(self, where: str, op: Op) -> bool:
        """Whether a collective overlaps: printed so, or on TPU run by a fusion or a SparseCore."""
        return (
            op.opcode.endswith("-start")
            or where in self._started
            or self.calls(where, "AsyncCollectiveStart")
        )

    def repeats_async(self, where: str) -> bool:
        """TPU prints an asynchronous collective again in every fusion that overlaps with it."""
        if self.calls(where, "AsyncCollectiveStart"):
            return False
        overlapped = where.startswith("async_collective_fusion")
        return overlapped or self.calls(where, "AsyncCollectiveDone")

    def trip_count(self, where: str, loop: Op) -> int | None:
        """Iterations of a `while`, None when they depend on data.

        CPU and GPU print them. On TPU the condition compares a counter with a bound that is a
        constant, or an element of the loop's state that the body hands on unchanged.
        """
        if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        (condition,), (body,) = loop.called("condition"), loop.called("body")
        start = self._elements(where, self[where][loop.operands[0]])
        end = self._elements(body, self.root(body))
        bounds, counters = [], []
        for _, _, place, op in self.executed(condition):
            if op.opcode == "constant" and op.type.startswith(("s32[]", "u32[]", "s64[]")):
                bounds.append(int(op.literal))
            elif op.opcode == "get-tuple-element" and place == condition:
                index = int(op.attribute(r"index=(\d+)"))
                next_value = end.get(index)
                if next_value and next_value.attribute(r"index=(\d+)") == str(index):
                    bounds.append(_constant(start.get(index)))
                else:
                    counters.append(index)
        if len(counters) != 1 or len(bounds) != 1 or bounds[0] is None:
            return None
        first, step = _constant(start.get(counters[0])) or 0, 1
        if (update := end.get(counters[0])) and update.opcode == "add":
            steps = [_constant(self._source(body, name)) for name in update.operands]
            step = next((value for value in steps if value), 1)
        return max(0, math.ceil((bounds[0] - first) / step))

    def _elements(self, where: str, op: Op) -> dict[int, Op]:
        names = op.operands if op.opcode == "tuple" else ()
        return {i: self._source(where, name) for i, name in enumerate(names)}

    def _source(self, where: str, name: str) -> Op:
        op = self[where][name]
        return self._source(where, op.operands[0]) if op.opcode == "copy" else op

    def matmul_flops(self, where: str, op: Op) -> int:
        """2 FLOPs per multiply-accumulate of a dot or convolution."""
        if op.opcode not in ("dot", "convolution"):
            return 0
        left, right = (_shape(self[where][name].type) for name in op.operands)
        out = _shape(op.type)
        if op.opcode == "dot":
            contracted = op.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
            return 2 * math.prod(out) * math.prod(left[i] for i in integers(contracted))
        lhs, rhs, result = re.split("_|->", op.attribute(r"dim_labels=(\w+->\w+)"))
        window = dict(part.split("=") for part in op.attribute(r"window=\{([^}]*)\}").split())
        flops = 2 * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
        for i, axis in enumerate(sorted(filter(str.isdigit, result))):

            def field(name: str, default: int, i: int = i) -> int:
                return int(window[name].split("x")[i].split("_")[0]) if name in window else default

            # TPU writes the batch dimensions of a dot as windows whose taps mostly hit padding or
            # the holes of a dilated input; only taps on real elements are work.
            outputs = np.arange(out[result.index(axis)])[:, None] * field("stride", 1)
            taps = np.arange(field("size", 1)) * field("rhs_dilate", 1) - field("pad", 0)
            dilation, place = field("lhs_dilate", 1), outputs + taps
            last = (left[lhs.index(axis)] - 1) * dilation
            flops *= int(((place >= 0) & (place <= last) & (place % dilation == 0)).sum())
        return flops

    def hbm_bytes(self, where: str, op: Op) -> int:
        """Bytes an unfused instruction reads from and writes to off-chip memory."""
        if op.opcode in _NO_TRAFFIC or op.opcode.endswith("-done"):
            return 0
        if 'custom_call_target="AllocateBuffer"' in op.attributes:
            return 0
        return self._written(where, op) + sum(
            self._read(where, op, position) for position in range(len(op.operands))
        )

    def _read(self, where: str, op: Op, position: int) -> int:
        whole = array_bytes(self[where][op.operands[position]].type, off_chip=True)
        if op.opcode == "tuple" or (op.opcode == "dynamic-update-slice" and position == 0):
            return 0  # handed on, or updated in place
        if op.opcode == "dynamic-slice":
            return min(whole, array_bytes(op.type))
        if op.opcode == "bitcast":
            return min(whole, self._read_by_users(where, op))
        if op.opcode == "fusion":
            (inside,) = op.called("calls")
            parameter = next(
                inner
                for inner in self[inside].values()
                if inner.opcode == "parameter" and inner.literal == str(position)
            )
            return min(whole, self._read_by_users(inside, parameter))
        return whole

    def _read_by_users(self, where: str, op: Op) -> int:
        return sum(
            self._read(where, user, position)
            for user in self[where].values()
            for position, name in enumerate(user.operands)
            if name == op.name
        )

    def _written(self, where: str, op: Op) -> int:
        whole = array_bytes(op.type, off_chip=True)
        if op.opcode == "fusion":
            (inside,) = op.called("calls")
            return min(whole, self._written(inside, self.root(inside)))
        if op.opcode in ("tuple", "bitcast"):
            return sum(self._written(where, self[where][name]) for name in op.operands)
        if op.opcode == "dynamic-update-slice":
            return min(whole, array_bytes(self[where][op.operands[1]].type))
        return 0 if op.opcode == "parameter" else whole


def _constant(op: Op | None) -> int | None:
    return int(op.literal) if op and op.opcode == "constant" else None


def integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _shape(kind: str) -> list[int]:
    return integers(kind[kind.index("[") : kind.index("]")])


def array_bytes(kind: str, off_chip: bool = False) -> int:
    """Bytes of an array or tuple type; S(n) in a layout names an on-chip memory."""
    total = 0
    for dtype, shape, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", kind):
        bits = 8 if dtype == "pred" else integers(dtype)[0] if integers(dtype) else 0
        if not (off_chip and "S(" in layout):
            total += math.ceil(bits * math.prod(integers(shape)) / 8)
    return total
