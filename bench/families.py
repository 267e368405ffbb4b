"""The decoder beside `transformers`, family by family: the largest difference of a logit, relative to the largest logit.

    python bench/families.py [--seeds=3]

Tiny random models in float32, read from the folders that transformers saves. "plain" is two rows of 40 tokens, "packed"
several segments in a row against each alone, "cached" 12 tokens generated from prompts padded on the left.
"""

import pathlib
import sys
import tempfile

from absl import app, flags

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))  # the models are those of the tests

flags.DEFINE_integer("seeds", 3, "Random models of each case; the worst is printed.")


def main(_):
    import torch_families

    print(f"| {'family':<36} | {'plain':<7} | {'packed':<7} | {'cached':<7} |")
    print(f"| {'-' * 36} | {'-' * 7} | {'-' * 7} | {'-' * 7} |")
    for case in torch_families.CASES:
        worst = [0.0, 0.0, 0.0]
        for seed in range(flags.FLAGS.seeds):
            theirs = torch_families.make(case, seed)
            with tempfile.TemporaryDirectory() as folder:
                theirs.save_pretrained(folder)
                ours = torch_families.load(folder)
            measures = (torch_families.plain, torch_families.packed, torch_families.cached)
            worst = [max(one, measure(theirs, *ours)) for one, measure in zip(worst, measures, strict=True)]
        print(f"| {case:<36} | {worst[0]:.1e} | {worst[1]:.1e} | {worst[2]:.1e} |", flush=True)


if __name__ == "__main__":
    app.run(main)
