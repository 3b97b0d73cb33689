"""The `selfsup` command. Each subcommand is a plain function; its imports wait until it is called."""

import sys
from collections.abc import Callable

import tyro

USAGE = """\
usage: selfsup COMMAND ...

  train CONFIG [--key value ...]     pretrain; --resume DIR, --init-from DIR, --dry-run
  probe RUN [RUN ...]                score frozen features: weighted kNN and logistic regression
  export RUN                         write a folder that timm and transformers load, and verify it
  embed SOURCE SHARDS --out FILE     features with sample keys, to .npz or .safetensors

  data pack FOLDER DEST              a folder of images into WebDataset shards with an index
  data index SHARDS                  build the index of shards made elsewhere
  data check SHARDS                  verify every shard, checksum and image

selfsup COMMAND --help tells more."""


def main() -> int:
    """Runs one subcommand. Returns the exit code: 2 for a fault the user can mend."""
    arguments = sys.argv[1:]
    try:
        match arguments:
            case ["train", *rest]:
                from selfsup.train import main as train

                return train(rest)
            case ["probe", *rest]:
                from selfsup.probe.compare import main_probe

                return _call(main_probe, "selfsup probe", rest)
            case ["export", *rest]:
                from selfsup.export.timm import main_export

                return _call(main_export, "selfsup export", rest)
            case ["embed", *rest]:
                from selfsup.probe.embed import main_embed

                return _call(main_embed, "selfsup embed", rest)
            case ["data", "pack", *rest]:
                from selfsup.data.pack import main_pack

                return _call(main_pack, "selfsup data pack", rest)
            case ["data", "index", *rest]:
                from selfsup.data.index import main_index

                return _call(main_index, "selfsup data index", rest)
            case ["data", "check", *rest]:
                from selfsup.data.check import main_check

                return _call(main_check, "selfsup data check", rest)
            case [] | ["-h" | "--help"] | ["data"] | ["data", "-h" | "--help"]:
                print(USAGE)
                return 0
    except ValueError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    print(f"error: unknown command: selfsup {' '.join(arguments[:2])}\n\n{USAGE}", file=sys.stderr)
    return 2


def _call(function: Callable[..., None], prog: str, arguments: list[str]) -> int:
    """Parses the function's arguments by its signature and calls it."""
    tyro.cli(function, prog=prog, args=arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
