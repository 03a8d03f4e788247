"""QuantizedLSTM, QuantizedGRU and QuantizedRNN: recurrent layers with a quantizer for each operand of each product.

torch computes a recurrent layer in one operator, whose products nothing outside can reach. Once a quantizer is
attached, these layers run step by step: input projections of all steps at once, the recurrent product in the loop.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastforward.nn.module import QuantizedModule
from fastforward.nn.operands import operand_stub, quantize_parameter
from fastforward.nn.quantizer import Quantizer

# Roles of the quantizers for results inside a step, and the operator that stands for each.
_RESULTS = {"gates": "linear", "activation": "sigmoid", "state": "add"}
# State of one direction: the hidden state, and for an LSTM the cell state.
State = tuple[Tensor, ...]


class _QuantizedRecurrent(QuantizedModule, torch.nn.RNNBase, include_in_module_map=False):
    """What the recurrent layers share: their quantizers, the walk over layers, directions and steps.

    For each layer and direction, with suffix ``_l<layer>`` or ``_l<layer>_reverse``: ``input_quantizer`` and
    ``hidden_quantizer`` for the operands of the products, ``gates_quantizer`` for their results,
    ``activation_quantizer`` for what sigmoid and tanh yield, ``state_quantizer`` for what becomes the next state;
    ``weight_ih_quantizer``, ``weight_hh_quantizer`` and, where the parameters exist, ``bias_ih_quantizer``,
    ``bias_hh_quantizer``, ``weight_hr_quantizer``. One ``output_quantizer`` for the result.
    """

    float_class: ClassVar[type[torch.nn.Module] | None] = None
    output_quantizer: Quantizer

    def __init_quantization__(self) -> None:
        super().__init_quantization__()
        for suffix in self._suffixes():
            for role in ("input", "hidden"):
                self.register_quantizer(f"{role}_quantizer{suffix}", operand_stub("input", "linear"))
            for role, operator in _RESULTS.items():
                self.register_quantizer(f"{role}_quantizer{suffix}", operand_stub("output", operator))
            for parameter in ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh"):
                present = hasattr(self, parameter + suffix)
                stub = operand_stub(parameter.partition("_")[0], "linear") if present else None
                self.register_quantizer(f"{parameter}_quantizer{suffix}", stub)
        self.register_quantizer("output_quantizer", operand_stub("output", "linear"))

    def _suffixes(self) -> Iterator[str]:
        for layer in range(self.num_layers):
            yield from (f"_l{layer}", f"_l{layer}_reverse") if self.bidirectional else (f"_l{layer}",)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As in torch: ``[steps, batch, features]`` (or batch first, unbatched, packed) and the initial state."""
        if self._float_only:
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if self.batch_first and batched else x
        y, state = self._layers(list(x.unbind(0)), self._initial(x[0], hx, batched))
        out = self.output_quantizer(torch.stack(y))
        out = out.transpose(0, 1) if self.batch_first and batched else out
        return (out, self._final(state)) if batched else (out.squeeze(1), self._final([s.squeeze(1) for s in state]))

    def _packed(self, packed: PackedSequence, hx: Any) -> Any:
        sizes = packed.batch_sizes.tolist()
        order, back = packed.sorted_indices, packed.unsorted_indices
        given = (
            None if hx is None else [state if order is None else state.index_select(1, order) for state in _states(hx)]
        )
        steps = list(packed.data.split(sizes))
        y, state = self._layers(steps, self._initial(steps[0], given, True))
        final = state if back is None else [one.index_select(1, back) for one in state]
        data = self.output_quantizer(torch.cat(y))
        return PackedSequence(data, packed.batch_sizes, order, back), self._final(final)

    def _initial(self, first: Tensor, hx: Any, batched: bool) -> list[Tensor]:
        """The initial state of every layer and direction: tensors ``[layers * directions, batch, size]``."""
        if hx is not None:
            return [state if batched else state.unsqueeze(1) for state in _states(hx)]
        count = self.num_layers * (2 if self.bidirectional else 1)
        return [first.new_zeros(count, first.shape[0], size) for size in self._state_sizes()]

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def _final(self, state: list[Tensor]) -> Any:
        return state[0]

    def _layers(self, steps: list[Tensor], initial: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Run all layers over the steps; returns the last layer's outputs and the final states."""
        finals: list[State] = []
        directions = 2 if self.bidirectional else 1
        suffixes = list(self._suffixes())
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                start = tuple(state[index] for state in initial)
                y, final = self._direction(suffixes[index], steps, start, reverse=direction == 1)
                outputs.append(y)
                finals.append(final)
            steps = [torch.cat(pair, -1) for pair in zip(*outputs, strict=True)] if directions == 2 else outputs[0]
            if self.dropout and self.training and layer < self.num_layers - 1:
                steps = [torch.nn.functional.dropout(step, self.dropout) for step in steps]
        return steps, [torch.stack(states) for states in zip(*finals, strict=True)]

    def _direction(
        self, suffix: str, steps: list[Tensor], start: State, *, reverse: bool
    ) -> tuple[list[Tensor], State]:
        """One layer in one direction. Steps of a packed sequence shrink: the states of ended rows are set aside."""
        sizes = [step.shape[0] for step in steps]
        x = getattr(self, f"input_quantizer{suffix}")(torch.cat(steps))
        projected = getattr(self, f"gates_quantizer{suffix}")(self._product("ih", suffix, x)).split(sizes)
        cell = self._cell(suffix)
        state = tuple(one[: sizes[-1 if reverse else 0]] for one in start)
        ended: list[State] = []
        outputs: list[Tensor] = []
        for t in reversed(range(len(steps))) if reverse else range(len(steps)):
            size, now = sizes[t], state[0].shape[0]
            if size < now:
                ended.append(tuple(one[size:] for one in state))
                state = tuple(one[:size] for one in state)
            elif size > now:
                state = tuple(torch.cat([one, first[now:size]]) for one, first in zip(state, start, strict=True))
            state = cell(projected[t], state)
            outputs.append(state[0])
        for rows in reversed(ended):
            state = tuple(torch.cat(pair) for pair in zip(state, rows, strict=True))
        return (outputs[::-1] if reverse else outputs), state

    def _product(self, name: str, suffix: str, x: Tensor) -> Tensor:
        """``x W^T + b`` with the quantized parameters ``weight_<name>`` and ``bias_<name>``."""
        return torch.nn.functional.linear(x, self._weight(name, suffix), self._bias(name, suffix))

    def _weight(self, name: str, suffix: str) -> Tensor:
        quantizer: Quantizer = getattr(self, f"weight_{name}_quantizer{suffix}")
        weight: Tensor = quantizer(getattr(self, f"weight_{name}{suffix}"))
        return weight

    def _bias(self, name: str, suffix: str) -> Tensor | None:
        return quantize_parameter(
            getattr(self, f"bias_{name}_quantizer{suffix}"), getattr(self, f"bias_{name}{suffix}", None)
        )

    def _gates(self, suffix: str) -> Callable[[Tensor], Tensor]:
        """The recurrent product: quantized hidden state in, gates out; parameters are quantized once."""
        weight, bias = self._weight("hh", suffix), self._bias("hh", suffix)
        operand, result = getattr(self, f"hidden_quantizer{suffix}"), getattr(self, f"gates_quantizer{suffix}")
        return lambda hidden: result(torch.nn.functional.linear(operand(hidden), weight, bias))

    def _results(self, suffix: str) -> tuple[Quantizer, ...]:
        """The quantizers of results: gates, activations, state."""
        return tuple(getattr(self, f"{role}_quantizer{suffix}") for role in _RESULTS)

    def _cell(self, suffix: str) -> Callable[[Tensor, State], State]:
        """One step: the projected input and the state in, the new state out; parameters are quantized once."""
        raise NotImplementedError


class QuantizedRNN(_QuantizedRecurrent, torch.nn.RNN):
    """``torch.nn.RNN`` on quantized operands: ``h' = act(W_ih x + b_ih + W_hh h + b_hh)``."""

    float_class = torch.nn.RNN

    def _cell(self, suffix: str) -> Callable[[Tensor, State], State]:
        recurrent, (gate, act, _) = self._gates(suffix), self._results(suffix)
        activation = torch.tanh if self.nonlinearity == "tanh" else torch.relu

        def cell(x: Tensor, state: State) -> State:
            return (act(activation(gate(x + recurrent(state[0])))),)

        return cell


class QuantizedGRU(_QuantizedRecurrent, torch.nn.GRU):
    """``torch.nn.GRU`` on quantized operands; gates in torch's order: reset, update, new."""

    float_class = torch.nn.GRU

    def _cell(self, suffix: str) -> Callable[[Tensor, State], State]:
        recurrent, (gate, act, keep) = self._gates(suffix), self._results(suffix)

        def cell(x: Tensor, state: State) -> State:
            x_reset, x_update, x_new = x.chunk(3, -1)
            h_reset, h_update, h_new = recurrent(state[0]).chunk(3, -1)
            reset = act(torch.sigmoid(gate(x_reset + h_reset)))
            update = act(torch.sigmoid(gate(x_update + h_update)))
            new = act(torch.tanh(gate(x_new + gate(reset * h_new))))
            return (keep(keep(keep(1 - update) * new) + keep(update * state[0])),)

        return cell


class QuantizedLSTM(_QuantizedRecurrent, torch.nn.LSTM):
    """``torch.nn.LSTM`` on quantized operands, with or without projection; gates: input, forget, cell, output."""

    float_class = torch.nn.LSTM

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size, self.hidden_size)

    def _final(self, state: list[Tensor]) -> Any:
        return tuple(state)

    def _cell(self, suffix: str) -> Callable[[Tensor, State], State]:
        recurrent, (gate, act, keep) = self._gates(suffix), self._results(suffix)
        projection = self._projection(suffix)

        def cell(x: Tensor, state: State) -> State:
            enter, forget, candidate, leave = gate(x + recurrent(state[0])).chunk(4, -1)
            kept = keep(act(torch.sigmoid(forget)) * state[1])
            memory = keep(kept + keep(act(torch.sigmoid(enter)) * act(torch.tanh(candidate))))
            hidden = keep(act(torch.sigmoid(leave)) * act(torch.tanh(memory)))
            if projection is not None:
                hidden = keep(projection(hidden))
            return hidden, memory

        return cell

    def _projection(self, suffix: str) -> Callable[[Tensor], Tensor] | None:
        """What makes the hidden state smaller, if anything does; its weight is quantized once."""
        if not self.proj_size:
            return None
        weight, operand = self._weight("hr", suffix), getattr(self, f"hidden_quantizer{suffix}")
        return lambda hidden: torch.nn.functional.linear(operand(hidden), weight)


def _states(hx: Any) -> list[Tensor]:
    return [hx] if isinstance(hx, Tensor) else list(hx)
