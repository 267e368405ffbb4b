"""Make the demo's world: text to pretrain the small base on, its tokenizer, and instructions to adapt it with.

    python configs/demo/make_data.py --to=runs/demo_data

A small world of animals with homes, hats and friends. Every text states facts that were drawn at random and then
tells them again, as an answer, a retelling or a list turned round, so that predicting it needs no knowledge, only the
looking up of what was said before: the one skill a model of a million parameters learns in minutes, and the
skill the instructions need. What the instructions need besides, their form, never occurs in the pretraining text: that is
left for the adapter to learn. In turn, no story or list of the instructions occurs in the pretraining text.

Everything follows from `--seed`, byte for byte. Nothing but SentencePiece is needed beside Python itself.
"""

import argparse
import io
import json
import pathlib
import random
from dataclasses import dataclass

SHE = "Mia Ada Eva Lily Rose Nora Ella Anna Ida Clara Lucy Ruby Ivy Maya Zoe Tess Wren Dora Hazel Flora Pia Greta Elsa Juno"
SHE = f"{SHE} Vera Nell May Fay Cora Lena".split()
HE = "Tom Ben Max Sam Leo Finn Otto Hugo Theo Jack Noah Luke Oscar Paul Emil Karl Rolf Ned Gus Jim Axel Ivan Felix Adam"
HE = f"{HE} Bruno Ralf Toby Kit Hans Ray".split()
PRONOUNS = {name: {"She": "She", "she": "she", "her": "her", "Her": "Her"} for name in SHE}
PRONOUNS |= {name: {"She": "He", "she": "he", "her": "his", "Her": "His"} for name in HE}

KINDS = "fox hare mole bear wolf goat lamb hen duck goose mouse cat dog pig pony toad frog crow swan deer badger beaver".split()
PLACES = "in the barn|in the mill|in the tower|in the forest|in the garden|in the cave|by the lake|by the river|by the bridge|"
PLACES = f"{PLACES}by the sea|by the road|on the hill|on the farm|on the island|under the oak|under the rock".split("|")
LOOKS = "old new big small quiet green dark sunny windy far pretty lonely cold warm grey hidden".split()
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
    """One kind of fact: how it is stated, asked for, answered and told again. `{v}` is its value."""

    statements: tuple[str, ...]  # predicates, to follow a name
    question: str
    answer: str
    who: str  # the question that goes the other way; its answer is "It is {name}."
    retelling: str


RELATIONS = {
    "kind": Relation(
        ("is a {v}", "is a young {v}"),
        "What kind of animal is {name}?",
        "{She} is a {v}.",
        "Who is a {v}?",
        "{name} was as clever as a {v} can be.",
    ),
    "home": Relation(
        ("lives {v}", "has a home {v}"),
        "Where does {name} live?",
        "{She} lives {v}.",
        "Who lives {v}?",
        "At night {name} slept {v}.",
    ),
    "food": Relation(
        ("likes {v}", "loves to eat {v}"),
        "What does {name} like to eat?",
        "{She} likes {v}.",
        "Who likes {v}?",
        "For supper {name} ate {v}.",
    ),
    "hat": Relation(
        ("wears a {v} hat", "has a {v} hat"),
        "Which hat does {name} wear?",
        "{She} wears a {v} hat.",
        "Who wears a {v} hat?",
        "Then {name} put on {her} {v} hat.",
    ),
    "things": Relation(
        ("carries {v}", "has {v} in a bag"),
        "What does {name} carry?",
        "{She} carries {v}.",
        "Who carries {v}?",
        "Then {name} counted {her} {v}.",
    ),
    # Last, because a sentence that names a second animal must not go on about the first.
    "friend": Relation(
        ("has a friend called {v}", "is a good friend of {v}"),
        "Who is the friend of {name}?",
        "{Her} friend is {v}.",
        "Whose friend is {v}?",
        "The next day {name} went to see {her} friend {v}.",
    ),
}


@dataclass(frozen=True)
class Fact:
    name: str
    relation: str
    value: str

    def say(self, pattern: str) -> str:
        return pattern.format(name=self.name, v=self.value, **PRONOUNS[self.name])

    def state(self, rng: random.Random) -> str:
        return self.say(RELATIONS[self.relation].statements[rng.random() < 0.3])

    def question_and_answer(self, rng: random.Random) -> tuple[str, str]:
        """Three times in four ask for the value, else for the animal."""
        relation = RELATIONS[self.relation]
        if rng.random() < 0.75:
            return self.say(relation.question), self.say(relation.answer)
        return self.say(relation.who), self.say("It is {name}.")


def draw_facts(rng: random.Random) -> list[Fact]:
    """A few facts about each of one, two or three animals; no two animals share a value."""
    count, known = rng.choice([(1, 2), (1, 4), (2, 2), (2, 3), (3, 2), (3, 3)])
    names = rng.sample(SHE + HE, 2 * count)  # the animals, then their friends
    homes = [place.replace("the", f"the {rng.choice(LOOKS)}") for place in rng.sample(PLACES, count)]
    things = [f"{rng.choice(NUMBERS[1:])} {thing}" for thing in rng.sample(THINGS, count)]
    values = {"kind": rng.sample(KINDS, count), "home": homes, "food": rng.sample(FOODS, count)}
    values |= {"hat": rng.sample(COLOURS, count), "things": things, "friend": names[count:]}
    return [
        Fact(name, relation, values[relation][i])
        for i, name in enumerate(names[:count])
        for relation in sorted(rng.sample(list(RELATIONS), known), key=list(RELATIONS).index)
    ]


def tell(facts: list[Fact], rng: random.Random) -> str:
    """An opening that names the animals, then their facts, one or two to a sentence, the sentences in random order."""
    names = list(dict.fromkeys(fact.name for fact in facts))
    sentences = []
    for name in names:
        predicates = [fact.state(rng) for fact in facts if fact.name == name]
        while predicates:
            taken = predicates[: rng.choice([1, 2])]
            predicates = predicates[len(taken) :]
            sentences.append(f"{name} {' and '.join(taken)}.")
    rng.shuffle(sentences)
    company = " and ".join([", ".join(names[:-1]), names[-1]][len(names) == 1 :])
    return " ".join([f"{rng.choice(OPENINGS)} {company} {rng.choice(MEETINGS)}.", *sentences])


def story(facts: list[Fact], rng: random.Random) -> str:
    """A text for pretraining: the facts, and then some of them again and again: retold, spoken, or asked line by line."""
    asker, speaker = rng.sample(SPEAKERS, 2)
    parts = [tell(facts, rng)]
    for fact in rng.choices(facts, k=8):
        question, answer = fact.question_and_answer(rng)
        form = rng.random()
        if form < 0.3:
            parts.append(f" {question} asked the {asker}. {answer[:-1]}, said the {speaker}.")
        elif form < 0.6:
            parts.append(f"\n{question}\n{answer}")
        elif form < 0.8:
            parts.append(f" The {speaker} said that {fact.name} {fact.state(rng)}.")
        else:
            parts.append(f" {fact.say(RELATIONS[fact.relation].retelling)}")
    return "".join(parts)


WORDS = sorted({*KINDS, *LOOKS, *FOODS, *COLOURS, *THINGS})
LIST_TASKS = {  # what is asked of a list of words: the instruction, the question in the text, the answer
    "backwards": ("Say the words backwards.", "What are they backwards?"),
    "first": ("Name the first word.", "Which is the first?"),
    "last": ("Name the last word.", "Which is the last?"),
    "count": ("Count the words.", "How many are there?"),
}


def list_answer(words: list[str], task: str) -> str:
    if task == "backwards":
        return f"They are {', '.join(reversed(words))}."
    if task == "count":
        return f"There are {NUMBERS[len(words) - 1]}."
    return f"It is {words[0 if task == 'first' else -1]}."


def list_text(lists: list[list[str]], rng: random.Random) -> str:
    """A text for pretraining about three or four lists of words, in the same manners as a story."""
    parts = []
    for words in lists:
        parts.append(f"The words are {', '.join(words)}.")
        if rng.random() < 0.7:
            parts.append(f" Again they are {', '.join(words)}.")
        for task in rng.sample(list(LIST_TASKS), 2):
            question, answer = LIST_TASKS[task][1], list_answer(words, task)
            if rng.random() < 0.5:
                asker, speaker = rng.sample(SPEAKERS, 2)
                parts.append(f" {question} asked the {asker}. {answer[:-1]}, said the {speaker}.")
            else:
                parts.append(f"\n{question}\n{answer}")
        parts.append("\n")
    return "".join(parts).rstrip()


def song(words: list[str], rng: random.Random) -> str:
    """A text for pretraining that says many words again in the same order: where the habit of looking back begins."""
    singers = rng.sample(SHE + HE, rng.randint(3, 6))
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
        """Texts to pretrain on: four stories to one text about lists."""
        rng = random.Random(f"{self.seed}/{name}")
        texts = []
        for _ in range(count):
            form = rng.random()
            if form < 0.55:
                texts.append(story(self.fresh(draw_facts, rng), rng))
            elif form < 0.75:
                texts.append(list_text([self.fresh(draw_words, rng) for _ in range(rng.choice([3, 4]))], rng))
            else:
                texts.append(song(rng.sample(WORDS, rng.randint(2, 14)), rng))
        return texts

    def instructions(self, name: str, count: int) -> list[dict[str, str]]:
        """Alpaca records: two in three ask about a story, the others about a list of words."""
        rng = random.Random(f"{self.seed}/{name}")
        records = []
        for _ in range(count):
            if rng.random() < 2 / 3:
                facts = self.fresh(draw_facts, rng)
                question, answer = rng.choice(facts).question_and_answer(rng)
                record = {"instruction": question, "input": tell(facts, rng), "output": answer}
            else:
                words, task = self.fresh(draw_words, rng), rng.choice(list(LIST_TASKS))
                record = {
                    "instruction": LIST_TASKS[task][0],
                    "input": f"The words are {', '.join(words)}.",
                    "output": list_answer(words, task),
                }
            records.append(record)
        return records


def draw_words(rng: random.Random) -> list[str]:
    return rng.sample(WORDS, rng.choice([2, 3, 4, 4, 5, 6]))


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


def make(seed: int, count: int, heldout: int, train: int, evaluation: int) -> dict[str, bytes]:
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
