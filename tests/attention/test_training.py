"""Real training with each kernel, on one process and two (DDP), checkpointed and compiled: one loss curve."""

import pytest

from running import Server, losses, make_shards, write_config


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder, server = tmp_path_factory.mktemp("kernels"), Server()
    config = write_config(folder, make_shards(folder / "shards"))

    def run(kernel, *options, ranks=1):
        name = "-".join([kernel, str(ranks), *map(str, options)]).replace("/", "_")
        arguments = [config, "--run.dir", folder / name, "--encoder.attention", kernel, *options]
        if not (folder / name).exists():
            server.run(arguments, folder / f"{name}.log", ranks)
        return losses(folder / name)

    yield run
    server.close()


def close(curve, expected, limit):
    assert [c[0] for c in curve] == [e[0] for e in expected]
    for (step, loss, norm), (_, right, right_norm) in zip(curve, expected, strict=True):
        assert abs(loss - right) <= limit * right and abs(norm - right_norm) <= 20 * limit * right_norm, step


@pytest.mark.parametrize("kernel", ["tiled", "torch", "auto"])
def test_the_same_loss_curve(train, kernel):
    close(train(kernel), train("reference"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["tiled", "torch"])
def test_the_same_on_two_processes_in_bf16_and_checkpointed(train, kernel):
    options = ("--precision.mixed", "bf16", "--run.activation-checkpointing", "true")
    close(train(kernel, *options, ranks=2), train("reference", *options, ranks=2), 2e-2)
    close(train(kernel, ranks=2), train("reference"), 1e-4)


@pytest.mark.slow
def test_tiled_compiled(train):
    close(train("tiled", "--run.compile", "true"), train("reference"), 1e-4)
