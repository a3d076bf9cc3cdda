"""Hold the channels of a student to the moments of its teacher's while it is trained: batch norm, with the teacher's statistics.

    teacher:   conv -+-> ...                             student:   conv -> [ (y - m) / d * g d' + m' + b ] -> ...
                     '-> m', d' of each channel ----------------------------------------^

m and d are mean and deviation of a channel of y over the batch (or the part of it that runs at once), m' and d' the teacher's, g and b
what the channel learns. A code of two bits that flips changes the mean and the spread of its channel, and all layers behind would have to
follow; so a flip changes what the channel says, and not how loud. Networks are trained with batch norms for that reason, and folding took
them away.

At inference m, d, m' and d' are those of the calibration images, so that all of it is a scale and a bias of the layer:

    scale <- scale g d' / d            bias <- (bias - m) g d' / d + m' + b

which also is why nothing new is learned: of a layer in front of a norm scale and bias do not matter, and the ratio of its scale to where
it started stands for g, the change of its bias for b. Only convolutions that had a batch norm are matched: their channels have a value at
every place of a map, so that the moments of a batch say something.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from operator import getitem

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph import called, fork, free_path, insert_behind, put_module
from fxquant.quantizers.learned import WeightLearner
from fxquant.reconstruction.learners import Learners
from fxquant.reconstruction.norms import NORMS

EPSILON = 1e-5
"""Added to variances, as batch norms do: channels with deviations far below its root are hardly matched, and hardly matter."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation ``sqrt(variance + EPSILON)`` of the channels of ``y [N, C, ...]``, ``[C]`` in float32 at least."""
    wide = torch.promote_types(y.dtype, torch.float32)
    ones, zeros = (make(y.shape[1], dtype=wide, device=y.device) for make in (torch.ones, torch.zeros))
    _, mean, inverse = torch.native_batch_norm(y, ones, zeros, None, None, True, 0.0, EPSILON)  # in one pass, of bfloat16 too
    return mean.to(wide), 1 / inverse.to(wide)


class Moments(nn.Module):
    """Gives the moments of what it is given."""

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the channels of ``y [N, C, ...]``."""
        return moments(y.detach())


class Match(nn.Module):
    """Gives the channels of a layer the moments of the teacher's, times and plus what they learn.

    Args:
        weight: the learner of the layer's weight, whose scale has one number a channel.
        bias: the layer's ``[C]``, learned.

    Attributes:
        seen: where the moments of what comes in are kept, with the teacher's; None: they are not.
    """

    start: Tensor

    def __init__(self, weight: WeightLearner, bias: nn.Parameter):
        super().__init__()
        self.scale, self.bias = weight.scale, bias
        self.register_buffer("start", bias.detach().clone())
        self.seen: list[tuple[Tensor, ...]] | None = None

    def gain(self) -> Tensor:
        """Return g ``[C]``."""
        return self.scale() / self.scale.start

    def forward(self, y: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        """Return y with the moments ``[C]`` of the teacher; of a single value a channel, their mean and what is learned."""
        if self.seen is not None:
            self.seen.append((*moments(y.detach()), mean, deviation))
        weight, bias = deviation * self.gain(), mean + self.bias - self.start
        return torch.native_batch_norm(y, weight, bias, None, None, True, 0.0, EPSILON)[0]

    @torch.no_grad()
    def fold(self) -> None:
        """Let scale and bias of the layer do what this does for all that was seen, in parts of one size."""
        assert self.seen is not None
        mean, deviation, their_mean, their_deviation = (torch.stack(values) for values in zip(*self.seen, strict=True))
        (mean, deviation), (their_mean, their_deviation) = _pooled(mean, deviation), _pooled(their_mean, their_deviation)
        factor = self.gain() * their_deviation / deviation
        shift = their_mean + self.bias - self.start - factor * mean
        self.scale.value.copy_(self.gain() * factor)
        self.bias.mul_(factor).add_(shift)
        self.seen = None


def _pooled(means: Tensor, deviations: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of all parts together, from those of the parts ``[parts, C]``."""
    mean = means.mean(0)
    return mean, ((deviations.square() + means.square()).mean(0) - mean.square()).clamp_min(EPSILON).sqrt()


class Matching:
    """A student and its teacher whose channels are matched.

    Args:
        learners: of the student; layers whose scale and bias both are learned are matched.
        teacher: the float graph, which knows of the norms that were folded.

    Attributes:
        matches: by the path of the layer.
    """

    def __init__(self, learners: Learners, teacher: GraphModule):
        layers, theirs = _calls(learners.graph), _calls(teacher)
        self.matches: dict[str, Match] = {}
        for path in teacher.meta.get(NORMS, {}):
            learner, bias = learners.weights.get(path), learners.biases.get(path)
            if learner is None or bias is None or not (learner.scale.value.requires_grad and bias.requires_grad):
                continue  # nothing of the layer's could take it over
            once = path in layers and path in theirs and isinstance(learners.graph.get_submodule(path), _CONVOLUTIONS)
            if once and learner.scale().shape == bias.shape:
                self.matches[path] = Match(learner, bias)

    def on_teacher(self, graph: GraphModule) -> GraphModule:
        """Return `graph`, a fork of the teacher's, with output ``(output, (mean, deviation, mean, ...))``."""
        new, found = fork(graph), list[Node]()
        calls = _calls(new)
        for path in self.matches:
            own = free_path(new, "moments")
            put_module(new, own, Moments())
            with new.graph.inserting_after(calls[path]):
                pair = new.graph.call_module(own, (calls[path],))
            with new.graph.inserting_after(pair):
                found += [new.graph.call_function(getitem, (pair, place)) for place in (0, 1)]
        output = new.graph.output_node()
        output.args = ((output.args[0], tuple(found)),)
        new.recompile()
        return new

    def on_student(self, graph: GraphModule) -> GraphModule:
        """Return `graph`, a fork of the student's, matched; it takes the teacher's moments behind its inputs."""
        new = fork(graph)
        calls, last = _calls(new), list(new.graph.find_nodes(op="placeholder"))[-1]
        for number, (path, match) in enumerate(self.matches.items()):
            theirs = []
            for name in ("mean", "deviation"):
                with new.graph.inserting_after(last):
                    last = new.graph.placeholder(f"their_{name}_{number}")
                theirs.append(last)
            own = free_path(new, "match")
            put_module(new, own, match)
            insert_behind(calls[path], own).args = (calls[path], *theirs)
        new.recompile()
        return new

    def fold(self, run: Callable[[], None]) -> None:
        """Let scales and biases of the student do what matching does; `run` calls it on the images whose moments count."""
        for match in self.matches.values():
            match.seen = []
        run()
        for match in self.matches.values():
            match.fold()


def _calls(gm: GraphModule) -> dict[str, Node]:
    """Return the calls of the modules that are called once, by path."""
    paths = Counter(str(node.target) for node, _ in called(gm))
    return {str(node.target): node for node, _ in called(gm) if paths[str(node.target)] == 1}
