"""Train the demo teacher's tokenizer: 8,000 Unigram pieces, modelled on the camembert tokenizer.

From: the training documents (not the held-out ones) of a corpus that make_corpus.py wrote.
To:   a folder that `AutoTokenizer.from_pretrained` loads (tokenizer.json, tokenizer_config.json).

Launch: python deployments/demo/make_tokenizer.py OUT/teacher-corpus/fr_meta deployments/demo/teacher
"""

import argparse
import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import zstandard
from make_corpus import is_heldout
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from tokenizers.trainers import UnigramTrainer
from transformers import PreTrainedTokenizerFast

PIECES = 8_000
TRAINING_BYTES = 25_000_000  # more text changes few pieces and takes longer
COMMON_WORDS = 500  # the most frequent words, each of which becomes one piece
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}  # ids 0 to 3
MASK = AddedToken("<mask>", lstrip=True, special=True)  # includes the space before it, as in the camembert tokenizer


def training_lines(folder: Path) -> Iterator[str]:
    """Lines of the training documents, up to TRAINING_BYTES in equal shares from all parts."""
    paths = sorted(folder.glob("*.jsonl.zst"))
    for path in paths:
        left = TRAINING_BYTES // len(paths)
        with path.open("rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as stream:
            for row in io.TextIOWrapper(stream, encoding="utf-8"):
                text = json.loads(row)["content"]
                if is_heldout(text):
                    continue
                yield from text.split("\n")
                left -= len(text.encode())
                if left <= 0:
                    break


def with_common_words(tokenizer: Tokenizer, lines: list[str]) -> None:
    """Makes each of the most frequent words ("à", "a", ":", "l'") one piece, in place of the least likely pieces.

    The trainer's suffix array proposes no piece that always ends its word, so it would split these words in two.
    """
    normalise, split = tokenizer.normalizer.normalize_str, tokenizer.pre_tokenizer.pre_tokenize_str
    counts = Counter(word for line in lines for word, _ in split(normalise(line)))
    model = json.loads(tokenizer.to_str())
    special = len(SPECIAL) + 1
    scored = [(piece, round(score, 2)) for piece, score in model["model"]["vocab"]]  # the last digits vary by run
    vocabulary = scored[:special] + sorted(scored[special:], key=lambda pair: (-pair[1], pair[0]))
    known = {piece for piece, _ in vocabulary}
    missing = [(word, count) for word, count in counts.most_common(COMMON_WORDS) if word not in known]
    unlikely = sorted((i for i in range(PIECES) if len(vocabulary[i][0]) > 1), key=lambda i: vocabulary[i][1])
    for index, (word, count) in zip(unlikely, missing, strict=False):
        vocabulary[index] = (word, math.log(count / counts.total()))
    tokenizer.model = Unigram(vocabulary, unk_id=tokenizer.token_to_id("<unk>"), byte_fallback=False)


def train(lines: list[str]) -> Tokenizer:
    """A Unigram tokenizer of PIECES pieces, special tokens and mask included."""
    tokenizer = Tokenizer(Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(left=False)]
    )
    # "first": text that follows a mask without a space ("<mask>.") has the same pieces as elsewhere.
    words = [
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        pre_tokenizers.Split(Regex("['’(]"), "merged_with_previous"),  # "l'employeur" is "l'" and "employeur"
        pre_tokenizers.Split(Regex("(?<!▁)[.,;:)]"), "isolated"),  # "semaine." is "semaine" and "."
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = [*SPECIAL.values(), MASK]
    trainer = UnigramTrainer(vocab_size=PIECES, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    with_common_words(tokenizer, lines)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    return tokenizer


def main() -> None:
    """Reads the command line, trains and saves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("corpus", type=Path, help="folder with fr_meta_part_N.jsonl.zst")
    parser.add_argument("out", type=Path, help="folder for the tokenizer")
    args = parser.parse_args()
    tokenizer = train(list(training_lines(args.corpus)))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL,
        cls_token="<s>",
        sep_token="</s>",
        mask_token=MASK,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],  # ModernBERT takes no token_type_ids
    )
    fast.save_pretrained(args.out)
    print(f"{len(fast):,} pieces in {args.out}")


if __name__ == "__main__":
    main()
