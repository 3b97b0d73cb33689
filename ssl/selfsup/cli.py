"""The `selfsup` command. Each subcommand is a plain function; its imports wait until it is called."""

import signal
import sys
from collections.abc import Callable

import tyro

USAGE = """\
usage: selfsup COMMAND ...

  train CONFIG [--key value ...]     pretrain; --resume DIR, --init-from DIR, --dry-run
  launch CONFIG --processes N        train on several processes: --where local, or slurm with --nodes M
  runs [FOLDER]                      the runs under a folder: state, step, loss, probe, time, cost; --json FILE
  probe RUN [RUN ...]                score frozen features: weighted kNN and logistic regression
  probe linear RUN [RUN ...]         MAE's linear probe; --mode paper augments, --seeds 0 1 2
  probe attentive RUN [RUN ...]      an attentive probe of the patch tokens
  probe finetune RUN [RUN ...]       fine-tune the whole encoder; --scratch: from random weights
  probe fewshot RUN [RUN ...]        a few labelled images a class, over several draws
  probe text RUN [RUN ...]           logistic regression on features of documents, beside TF-IDF
  probe text-finetune RUN [RUN ...]  fine-tune the whole encoder of text; --scratch: from random weights
  probe perplexity RUN               perplexity and bits per byte; pseudo-perplexity of a masked model
  probe show FILE [FILE ...]         results of RUN/probe in one table
  probe representation RUN           no labels: RankMe, alpha-ReQ, alignment, uniformity, LiDAR, CKA
  export RUN                         for timm, transformers, torchvision, facebookresearch/mae; verified
  embed SOURCE SHARDS --out FILE     features with sample keys, to .npz or .safetensors
  look RUN                           attention maps, reconstructions, views, neighbours, projector
  generate RUN                       text from a causal model; --prompt, --temperature, --top-k, --top-p
  fill RUN [TEXT ...]                a masked model's guesses for each [MASK]; without TEXT: graded
  doctor                             check libraries, devices, folders, shards

  attention check TARGET             put an attention kernel through the conformance suite
  attention bench TARGET [...]       time kernels that pass: forward, backward, memory, roofline
  attention mutants                  plant bugs in a kernel and see them caught
  attention explain LENGTH           which kernel `attention: auto` takes, and why

  scaling fit TABLE                  a scaling law of any table of runs, with intervals and doubts
  scaling predict --fit OUT          size, data and loss for --flops C or --hours T
  scaling report --fit OUT           pictures and one HTML page
  scaling plan CONFIG                cells of a sweep, their cost, and what their law would know; --json OUT
  scaling run PLAN                   run the cells, here or on SLURM; start it again after whatever stopped it

  data pack SOURCE DEST              images or text into WebDataset shards with an index; python-docs
  data index SHARDS                  build the index of shards made elsewhere
  data check SHARDS                  verify every shard, checksum, image and text
  data tokenizer SHARDS FILE         learn a tokenizer from text shards: wordpiece, bpe or char
  data tokenize SHARDS DEST          text shards into token shards; --tokenizer FILE
  data show SHARDS                   one HTML page: statistics, random samples, training views

selfsup COMMAND --help tells more."""


def main() -> int:
    """Runs one subcommand. Returns the exit code: 2 for a fault the user can mend."""
    arguments = sys.argv[1:]
    try:
        match arguments:
            case ["train", *rest]:
                from selfsup.dist import finish
                from selfsup.train import main as train

                return finish(train(rest))
            case ["launch", *rest]:
                from selfsup.launch import main as launch

                return launch(rest)
            case ["runs", *rest]:
                from selfsup.runs import main_runs

                return _call(main_runs, "selfsup runs", rest)
            case ["probe", "representation", *rest]:
                from selfsup.probe.describe import main_representation

                return _call(main_representation, "selfsup probe representation", rest)
            case ["probe", "linear", *rest]:
                from selfsup.probe.linear import main_linear

                return _call(main_linear, "selfsup probe linear", rest)
            case ["probe", "attentive", *rest]:
                from selfsup.probe.attentive import main_attentive

                return _call(main_attentive, "selfsup probe attentive", rest)
            case ["probe", "finetune", *rest]:
                from selfsup.probe.finetune import main_finetune

                return _call(main_finetune, "selfsup probe finetune", rest)
            case ["probe", "fewshot", *rest]:
                from selfsup.probe.fewshot import main_fewshot

                return _call(main_fewshot, "selfsup probe fewshot", rest)
            case ["probe", "text", *rest]:
                from selfsup.probe.text import main_text

                return _call(main_text, "selfsup probe text", rest)
            case ["probe", "text-finetune", *rest]:
                from selfsup.probe.text_finetune import main_text_finetune

                return _call(main_text_finetune, "selfsup probe text-finetune", rest)
            case ["probe", "perplexity", *rest]:
                from selfsup.probe.perplexity import main_perplexity

                return _call(main_perplexity, "selfsup probe perplexity", rest)
            case ["probe", "show", *rest]:
                from selfsup.probe.report import main_show

                return _call(main_show, "selfsup probe show", rest)
            case ["probe", *rest]:
                from selfsup.probe.compare import main_probe

                return _call(main_probe, "selfsup probe", rest)
            case ["export", *rest]:
                from selfsup.export.command import main_export

                return _call(main_export, "selfsup export", rest)
            case ["embed", *rest]:
                from selfsup.probe.embed import main_embed

                return _call(main_embed, "selfsup embed", rest)
            case ["generate", *rest]:
                from selfsup.text.generate import main_generate

                return _call(main_generate, "selfsup generate", rest)
            case ["fill", *rest]:
                from selfsup.text.fill import main_fill

                return _call(main_fill, "selfsup fill", rest)
            case ["data", "pack", *rest]:
                from selfsup.data.command import main_pack

                return _call(main_pack, "selfsup data pack", rest)
            case ["data", "tokenizer", *rest]:
                from selfsup.data.command import main_tokenizer

                return _call(main_tokenizer, "selfsup data tokenizer", rest)
            case ["data", "tokenize", *rest]:
                from selfsup.data.command import main_tokenize

                return _call(main_tokenize, "selfsup data tokenize", rest)
            case ["data", "index", *rest]:
                from selfsup.data.index import main_index

                return _call(main_index, "selfsup data index", rest)
            case ["data", "check", *rest]:
                from selfsup.data.check import main_check

                return _call(main_check, "selfsup data check", rest)
            case ["data", "show", *rest]:
                from selfsup.look.page import main_show

                return _call(main_show, "selfsup data show", rest)
            case ["look", *rest]:
                from selfsup.look.command import main_look

                return _call(main_look, "selfsup look", rest)
            case ["attention", "check", *rest]:
                from selfsup.conformance.command import main_check

                return tyro.cli(main_check, prog="selfsup attention check", args=rest)
            case ["attention", "bench", *rest]:
                from selfsup.conformance.bench import main_bench

                return tyro.cli(main_bench, prog="selfsup attention bench", args=rest)
            case ["attention", "mutants", *rest]:
                from selfsup.conformance.mutants import main_mutants

                return tyro.cli(main_mutants, prog="selfsup attention mutants", args=rest)
            case ["attention", "explain", *rest]:
                from selfsup.conformance.command import main_explain

                return _call(main_explain, "selfsup attention explain", rest)
            case ["scaling", "fit", *rest]:
                from selfsup.scaling.command import main_fit

                return tyro.cli(main_fit, prog="selfsup scaling fit", args=rest)
            case ["scaling", "predict", *rest]:
                from selfsup.scaling.command import main_predict

                return _call(main_predict, "selfsup scaling predict", rest)
            case ["scaling", "report", *rest]:
                from selfsup.scaling.command import main_report

                return _call(main_report, "selfsup scaling report", rest)
            case ["scaling", "plan", *rest]:
                from selfsup.scaling.sweep_command import main_plan

                return tyro.cli(main_plan, prog="selfsup scaling plan", args=rest)
            case ["scaling", "run", *rest]:
                from selfsup.scaling.sweep_command import main_run

                return tyro.cli(main_run, prog="selfsup scaling run", args=rest)
            case ["doctor", *rest]:
                from selfsup.doctor.command import main_doctor

                return tyro.cli(main_doctor, prog="selfsup doctor", args=rest)
            case [] | ["-h" | "--help"] | ["data" | "attention" | "scaling"]:
                print(USAGE)
                return 0
            case ["data" | "attention" | "scaling", "-h" | "--help"]:
                print(USAGE)
                return 0
    except (ValueError, OSError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what is written is whole", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"error: unknown command: selfsup {' '.join(arguments[:2])}\n\n{USAGE}", file=sys.stderr)
    return 2


def _call(function: Callable[..., None], prog: str, arguments: list[str]) -> int:
    """Parses the function's arguments by its signature and calls it."""
    tyro.cli(function, prog=prog, args=arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
