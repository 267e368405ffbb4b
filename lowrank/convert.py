"""Make a native base of any base that lowrank reads: the weights as they lie in memory, to be read by any slice.

    python -m lowrank.convert --from=models/Llama-2-7b --to=bases/llama2-7b
    python -m lowrank.convert --from=models/Llama-2-7b --to=bases/llama2-7b --dtype=bfloat16

The new folder works wherever the old one did (`--base`, `config.base`), and has its tokenizer and chat template.
"""

import sys

from absl import flags

from lowrank.cli import run as cli

flags.DEFINE_string("from", None, "The base to convert: a folder of any supported format, or a name on the hub.")
flags.DEFINE_string("to", None, "The folder to make.")
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of every tensor; default: each as it is stored.")
FLAGS = flags.FLAGS


def main(arguments: list[str]):
    from lowrank.weights.convert import convert  # here, so that --help does not wait for JAX

    cli.refuse_unknown(arguments)
    cli.require("from", "to")
    source, to = FLAGS["from"].value, FLAGS.to
    made = convert(source, to, FLAGS.dtype, progress=sys.stderr.isatty())
    print(
        f"converted {source} to {to}: {made.parameters:,} parameters, {made.nbytes / 1e9:.3g} GB in {made.files} "
        f"file{'s' * (made.files > 1)}, {'/'.join(made.dtypes)}, fingerprint {made.fingerprint}; {made.seconds:.1f} s, "
        f"{made.nbytes / made.seconds / 1e6:.0f} MB/s; read back, every bit equal"
    )


if __name__ == "__main__":
    cli.run(main)
