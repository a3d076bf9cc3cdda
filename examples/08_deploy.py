"""In production: load the small file, lower it to integers, compile it, warm it up, and answer a queue of images.

    pip install -e ".[demo]"
    python examples/08_deploy.py
    python examples/08_deploy.py --file resnet18-w2.safetensors --model resnet18 --most 8
    python examples/08_deploy.py --requests 5000 --clients 32

Without ``--file`` it trains a small network on scikit-learn's digits and quantizes that; nothing is downloaded. With it, images are random.

A compiled network is not fast from the first call on, so nobody is answered before the warm-up is over:
* the first call compiles (seconds to a minute): one graph for a single image, another one for batches, perhaps a third for large ones;
* oneDNN chooses a kernel when it meets a layer at a new batch size (with AVX-512 VNNI and without AMX a single image has fxquant's own).
One call at every size from 1 to the largest ends both. It is made in the thread that serves, with the number of threads set before:
compiled code holds for that thread's settings alone.
"""

from __future__ import annotations

import argparse
import queue
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import fxquant
from fxquant.networks import build


@dataclass
class Request:
    """One image ``[C, H, W]``, and where its logits ``[classes]`` are put."""

    image: Tensor
    answer: Future[Tensor] = field(default_factory=Future)


class Server:
    """Answers requests in batches: as many images as wait, up to `most`.

    Batches are not padded: the graph takes any size, and the sizes it will see were warmed up.

    Args:
        network: what was compiled.
        shape: that of one image.
        most: images in the largest batch.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], shape: tuple[int, ...], most: int):
        self.network, self.shape, self.most = network, shape, most
        self.requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.sizes: Counter[int] = Counter()

    def submit(self, image: Tensor) -> Future[Tensor]:
        """Queue one image, which becomes float32; its logits come out of the future.

        Raises:
            ValueError: an image of another shape, or of integers, which would fail the whole batch that it is in, or compile while others
                wait.
        """
        if not image.is_floating_point():
            raise ValueError(f"the image is of {str(image.dtype).removeprefix('torch.')}, and the server takes normalized floats")
        if tuple(image.shape) != tuple(self.shape):
            raise ValueError(f"the image is of shape {list(image.shape)}, and the server takes {list(self.shape)}")
        request = Request(image.float())
        self.requests.put(request)
        return request.answer

    def warm_up(self) -> None:
        """Call once at every batch size."""
        for size in range(1, self.most + 1):
            start = time.perf_counter()
            self.network(torch.zeros(size, *self.shape))
            seconds = time.perf_counter() - start
            if seconds > 0.5:
                print(f"    {size} image{'s' if size > 1 else ''}: {seconds:.1f} s")

    def serve(self) -> None:
        """Answer until a None is in the queue. A batch that fails fails its own requests, and the server goes on."""
        open_ = True
        while open_:
            batch, open_ = self._next_batch()
            if not batch:
                continue
            self.sizes[len(batch)] += 1
            try:
                logits = self.network(torch.stack([request.image for request in batch]))
            except Exception as error:
                for request in batch:
                    request.answer.set_exception(error)
            else:
                for request, row in zip(batch, logits, strict=True):
                    request.answer.set_result(row)

    def _next_batch(self) -> tuple[list[Request], bool]:
        """Wait for one request, take what else is there; and say whether to go on."""
        batch: list[Request] = []
        request = self.requests.get()
        while request is not None:
            batch.append(request)
            if len(batch) == self.most or self.requests.empty():
                return batch, True
            request = self.requests.get()
        return batch, False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="what fxquant.save wrote (default: train and quantize a network of digits)")
    parser.add_argument("--model", help="with --file: its architecture, a name of torchvision or timm")
    parser.add_argument("--num-classes", type=int, help="with --file: of the network (default: as published)")
    parser.add_argument("--epochs", type=int, default=30, help="without --file: of the training (default: 30)")
    parser.add_argument("--most", type=int, default=16, help="images in the largest batch (default: 16)")
    parser.add_argument("--requests", type=int, default=2000, help="(default: 2000)")
    parser.add_argument("--clients", type=int, default=24, help="that each wait for an answer before they ask again (default: 24)")
    parser.add_argument("--threads", type=int, default=1, help="of the network; clients have their own (default: 1)")
    options = parser.parse_args()
    if (options.file is None) != (options.model is None):
        parser.error("--file and --model go together")
    torch.set_num_threads(options.threads)

    # Once, wherever there is time: the float network becomes a small file.
    with tempfile.TemporaryDirectory() as folder:
        if options.file:
            path, architecture, images = options.file, build(options.model, num_classes=options.num_classes).model, None
        else:
            path = Path(folder) / "digits.safetensors"
            architecture, images = digits(path, options.epochs)

        # At every start of the server: load the file into its architecture (whose own weights do not matter), and lower it.
        simulation = fxquant.load(path, architecture)
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    lowered = fxquant.lower(simulation)
    print(f"lowered: {lowered_layers(lowered)}")
    shape = fxquant.report(simulation).record.input_shape
    if images is None:
        images = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))

    # Compile and warm up, before the first request is taken.
    server = Server(fxquant.compile(lowered), shape, options.most)
    start = time.perf_counter()
    print("warm-up:")
    server.warm_up()
    print(f"    {time.perf_counter() - start:.1f} s")

    # Some answers against the simulation: an image with a value on the border of two codes may come out differently, many must not.
    with torch.no_grad():
        expected = simulation(images[:64])
    logits = torch.cat([server.network(batch) for batch in images[:64].split(options.most)])
    difference = ((logits - expected).abs().max() / (expected.max() - expected.min())).item()
    agreement = (logits.argmax(1) == expected.argmax(1)).float().mean().item()
    print(f"first answers against the simulation: {difference:.1e} of the range of the logits, same class {agreement:.0%}")
    if agreement < 0.75:
        sys.exit("lowered and simulated network disagree: not serving")

    # Serve: clients in threads of their own, the network in this one, where it was warmed up.
    latencies: list[float] = []
    shares = [options.requests // options.clients + (client < options.requests % options.clients) for client in range(options.clients)]
    clients = [threading.Thread(target=ask, args=(server, images, share, latencies)) for share in shares]
    closing = threading.Thread(target=close_behind, args=(clients, server))
    start = time.perf_counter()
    for thread in (*clients, closing):
        thread.start()
    server.serve()
    seconds = time.perf_counter() - start
    closing.join()

    latencies.sort()
    percentiles = [1e3 * latencies[min(int(share * len(latencies)), len(latencies) - 1)] for share in (0.5, 0.95, 0.99)]
    batches = server.sizes.total()
    print(f"{len(latencies):,} images in {batches:,} batches, {len(latencies) / batches:.1f} on average: {sizes(server.sizes)}")
    print(f"{len(latencies) / seconds:,.0f} images a second on {options.threads} thread(s)")
    print("latency p50, p95, p99: " + ", ".join(f"{value:.2f}" for value in percentiles) + " ms")


def digits(path: Path, epochs: int) -> tuple[nn.Module, Tensor]:
    """Train a small network on real digits, write it to `path` in 2 bits, and return its architecture and images to ask about."""
    from fxquant.demo import DigitNet, load_digits, train_digits

    data = load_digits()
    model = train_digits(data, epochs)
    fxquant.save(fxquant.quantize(model, list(data.train[:512].split(64)), w=2, a=2, recipe="fast"), path)
    return DigitNet(), data.test


def lowered_layers(lowered: nn.Module) -> str:
    """Return how many layers compute on integers; none where the machine cannot, which a warning has said."""
    record = fxquant.report(lowered).record
    return f"{record.passes[-1].count} layers on integers" if record.lowered else "nothing, the simulation serves"


def ask(server: Server, images: Tensor, count: int, latencies: list[float]) -> None:
    """Ask `count` times, each behind the answer to the one before, and note the seconds."""
    for number in range(count):
        start = time.perf_counter()
        server.submit(images[number % len(images)]).result()
        latencies.append(time.perf_counter() - start)


def close_behind(clients: list[threading.Thread], server: Server) -> None:
    """Stop the server when all clients are done."""
    for client in clients:
        client.join()
    server.requests.put(None)


def sizes(counts: Counter[int]) -> str:
    """Return how often the commonest batch sizes came."""
    return ", ".join(f"{count}x {size}" for size, count in counts.most_common(4))


if __name__ == "__main__":
    try:
        main()
    except fxquant.FxquantError as error:
        sys.exit(f"error: {error}")
