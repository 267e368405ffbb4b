"""Make the demo's world: text to pretrain the small base on, its tokenizer, and instructions to adapt it with.

    python configs/demo/make_data.py --to=runs/demo_data

A small world of animals with homes, hats and things to carry. Every text states facts that were drawn at random and
then tells them again, as an answer or a list turned round, so that predicting it needs no knowledge, only the looking up
of what was said before: the one skill that a model of a million parameters learns in minutes, and the skill that
the instructions need. What they need besides, the Alpaca form and to stop after the answer, never occurs in the
pretraining text: that is left for the adapter to learn. No story and no list occurs in two of the files.

Wording is plain on purpose: an answer begins with the name and the verb of the sentence it repeats. With pronouns and
several wordings for each fact, a model of the same shape answered 42 % of 60 questions after 2 M tokens of pretraining.

Everything follows from `--seed`, byte for byte. Nothing but SentencePiece is needed beside Python itself.
"""

import argparse
import io
import json
import pathlib
import random
from dataclasses import dataclass

NAMES = (
    "Mia Ada Eva Lily Rose Nora Ella Anna Ida Clara Lucy Ruby Ivy Maya Zoe Tess Wren Dora Hazel Flora Pia Greta Elsa Juno "
    "Vera Nell May Fay Cora Lena Tom Ben Max Sam Leo Finn Otto Hugo Theo Jack Noah Luke Oscar Paul Emil Karl Rolf Ned Gus "
    "Jim Axel Ivan Felix Adam Bruno Ralf Toby Kit Hans Ray"
).split()
KINDS = "fox hare mole bear wolf goat lamb hen duck goose mouse cat dog pig pony toad frog crow swan deer badger beaver".split()
PLACES = (
    "barn mill tower forest garden cave castle harbour village city valley meadow cottage palace attic cellar inn school "
    "church shop tent boat stable orchard"
).split()
FOODS = "plums pears apples honey bread cheese soup cake nuts beans peas corn rice berries figs grapes pies melons carrots seeds"
FOODS = FOODS.split()
COLOURS = "red blue green yellow black white brown pink grey golden silver purple".split()
THINGS = (
    "bells coins keys shells books lamps stones ropes cups spoons drums flutes maps pens boxes candles feathers buttons"
)
THINGS = THINGS.split()
NUMBERS = ["one", "two", "three", "four", "five", "six"]
SPEAKERS = "baker miller teacher farmer king queen sailor doctor painter shepherd".split()
OPENINGS = ["One day", "Long ago", "One morning", "Last summer", "In spring", "One evening", "Once", "In winter"]
MEETINGS = ["met at the fair", "met on the road", "sat by the fire", "went to the market", "walked home", "had a feast"]


@dataclass(frozen=True)
class Relation:
    """One kind of fact: what is said of an animal, and how it is asked for. `{v}` is the value."""

    predicate: str
    question: str


RELATIONS = {
    "kind": Relation("is a {v}", "What is {name}?"),
    "home": Relation("lives in the {v}", "Where does {name} live?"),
    "food": Relation("likes {v}", "What does {name} like?"),
    "hat": Relation("wears a {v} hat", "Which hat does {name} wear?"),
    "things": Relation("carries {v}", "What does {name} carry?"),
}


@dataclass(frozen=True)
class Fact:
    name: str
    relation: str
    value: str

    @property
    def statement(self) -> str:
        """Also the answer: the name and the verb come again, so that the answer begins like what it repeats."""
        return f"{self.name} {RELATIONS[self.relation].predicate.format(v=self.value)}."

    @property
    def question(self) -> str:
        return RELATIONS[self.relation].question.format(name=self.name)


def draw_facts(rng: random.Random) -> list[Fact]:
    """A few facts about each of one, two or three animals; no two animals share a value."""
    count, known = rng.choice([(1, 3), (1, 5), (2, 2), (2, 3), (2, 4), (3, 2), (3, 3)])
    names = rng.sample(NAMES, count)
    things = [f"{rng.choice(NUMBERS[1:])} {thing}" for thing in rng.sample(THINGS, count)]
    values = {"kind": rng.sample(KINDS, count), "home": rng.sample(PLACES, count), "food": rng.sample(FOODS, count)}
    values |= {"hat": rng.sample(COLOURS, count), "things": things}
    return [
        Fact(name, relation, values[relation][i])
        for i, name in enumerate(names)
        for relation in rng.sample(list(RELATIONS), known)
    ]


def tell(facts: list[Fact], rng: random.Random) -> str:
    """An opening that names the animals, then their facts, a sentence each, in random order."""
    names = list(dict.fromkeys(fact.name for fact in facts))
    company = " and ".join([", ".join(names[:-1]), names[-1]][len(names) == 1 :])
    sentences = [fact.statement for fact in rng.sample(facts, len(facts))]
    return " ".join([f"{rng.choice(OPENINGS)} {company} {rng.choice(MEETINGS)}.", *sentences])


def story(facts: list[Fact], rng: random.Random) -> str:
    """A text for pretraining: the facts, and then some of them again and again: spoken, or asked line by line."""
    asker, speaker = rng.sample(SPEAKERS, 2)
    parts = [tell(facts, rng)]
    for fact in rng.choices(facts, k=rng.randint(4, 9)):
        form = rng.random()
        if form < 0.3:
            parts.append(f" {fact.question} asked the {asker}. {fact.statement}")
        elif form < 0.7:
            parts.append(f"\n{fact.question}\n{fact.statement}")
        else:
            parts.append(f" The {speaker} said that {fact.statement}")
    return "".join(parts)


WORDS = sorted({*KINDS, *PLACES, *FOODS, *COLOURS, *THINGS})
READ = "Read the story and answer the question."
LIST_TASKS = {  # what is asked of a list of words: the instruction, which is also the question in the texts
    "backwards": "Say the words backwards.",
    "first": "Name the first word.",
    "last": "Name the last word.",
}


def list_answer(words: list[str], task: str) -> str:
    if task == "backwards":
        return f"Backwards they are {', '.join(reversed(words))}."
    return f"The {task} word is {words[0 if task == 'first' else -1]}."


def list_text(lists: list[list[str]], rng: random.Random) -> str:
    """A text for pretraining about three or four lists of words, each followed by two tasks."""
    parts = []
    for words in lists:
        parts.append(f"The words are {', '.join(words)}.")
        if rng.random() < 0.7:
            parts.append(f" Again they are {', '.join(words)}.")
        for task in rng.sample(list(LIST_TASKS), 2):
            parts.append(f"\n{LIST_TASKS[task]}\n{list_answer(words, task)}")
        parts.append("\n")
    return "".join(parts).rstrip()


def song(words: list[str], rng: random.Random) -> str:
    """A text for pretraining that says many words again in the same order: where the habit of looking back begins."""
    singers = rng.sample(NAMES, rng.randint(2, 5))
    return f"{rng.choice(OPENINGS)} " + " Then ".join(f"{singer} sang {' '.join(words)}." for singer in singers)


class World:
    """Draws facts and lists that it has never drawn before, so that whatever is made later is new to what was made earlier."""

    def __init__(self, seed: int):
        self.seed = seed
        self.drawn: set = set()

    def fresh(self, draw, rng: random.Random):
        while True:
            thing = draw(rng)
            key = tuple(sorted(map(repr, thing))) if isinstance(thing[0], Fact) else tuple(thing)
            if key not in self.drawn:
                self.drawn.add(key)
                return thing

    def texts(self, name: str, count: int) -> list[str]:
        """Texts to pretrain on: stories, lists and songs as 70 : 15 : 15."""
        rng = random.Random(f"{self.seed}/{name}")
        texts = []
        for _ in range(count):
            form = rng.random()
            if form < 0.7:
                texts.append(story(self.fresh(draw_facts, rng), rng))
            elif form < 0.85:
                texts.append(list_text([self.fresh(draw_words, rng) for _ in range(rng.choice([3, 4]))], rng))
            else:
                texts.append(song(rng.sample(WORDS, rng.randint(2, 8)), rng))
        return texts

    def instructions(self, name: str, count: int) -> list[dict[str, str]]:
        """Alpaca records: four in five ask about a story, the others about a list of words."""
        rng = random.Random(f"{self.seed}/{name}")
        records = []
        for _ in range(count):
            if rng.random() < 0.8:
                facts = self.fresh(draw_facts, rng)
                fact = rng.choice(facts)
                text = f"{tell(facts, rng)}\n{fact.question}"
                record = {"instruction": READ, "input": text, "output": fact.statement}
            else:
                words, task = self.fresh(draw_words, rng), rng.choice(list(LIST_TASKS))
                record = {
                    "instruction": LIST_TASKS[task],
                    "input": f"The words are {', '.join(words)}.",
                    "output": list_answer(words, task),
                }
            records.append(record)
        return records


def draw_words(rng: random.Random) -> list[str]:
    return rng.sample(WORDS, rng.choice([2, 3, 3, 4]))


ALPACA = """Below is an instruction that describes a task, paired with an input that provides further context. Write a \
response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
{output}
Below is an instruction that describes a task. Write a response that appropriately completes the request."""


def train_tokenizer(texts: list[str], records: list[dict[str, str]]) -> bytes:
    """A SentencePiece model over the texts and the Alpaca prompts, with Llama's conventions and no normalisation."""
    import sentencepiece

    # SentencePiece reads lines; a newline in a text is encoded as its byte.
    lines = [line for text in [*texts, *(ALPACA.format(**record) for record in records)] for line in text.split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=1024,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def make(seed=0, count=36000, heldout=200, train=3000, evaluation=200) -> dict[str, bytes]:
    """Every file's name and content."""
    world = World(seed)  # instructions first, so that they do not depend on how much text is asked for
    instructions_eval = world.instructions("instructions_eval", evaluation)
    instructions = world.instructions("instructions", train)
    heldout_texts = world.texts("heldout", heldout)
    texts = world.texts("pretrain", count)

    def jsonl(texts: list[str]) -> bytes:
        return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()

    def alpaca(records: list[dict[str, str]]) -> bytes:
        return ("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n").encode()

    return {
        "pretrain.jsonl": jsonl(texts),
        "heldout.jsonl": jsonl(heldout_texts),
        "tokenizer.model": train_tokenizer(texts[:5000], instructions[:1000]),
        "instructions.json": alpaca(instructions),
        "instructions_eval.json": alpaca(instructions_eval),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo's texts, tokenizer and instructions.")
    parser.add_argument("--to", type=pathlib.Path, required=True, help="the folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=36000, help="texts to pretrain on")
    parser.add_argument("--heldout", type=int, default=200, help="texts held out")
    parser.add_argument("--train", type=int, default=3000, help="instruction records to train on")
    parser.add_argument("--eval", type=int, default=200, help="instruction records held out")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    for name, content in make(args.seed, args.count, args.heldout, args.train, args.eval).items():
        (args.to / name).write_bytes(content)
        print(f"{args.to / name}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
