"""What rewards are tested with: a batch of responses, a service on this machine, small reward models that read text."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from common.rewards.batch import RewardBatch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"what is two plus three five six a b c d e f user : assistant ?".split()]
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def batch_of(*responses: str, **columns) -> RewardBatch:
    count = len(responses)
    return RewardBatch(
        [f"prompt {number}" for number in range(count)],
        [[{"role": "user", "content": f"question {number}"}] for number in range(count)],
        list(responses),
        [[number] for number in range(count)],
        [True] * count,
        columns,
        [f"data.jsonl:{number + 1}" for number in range(count)],
    )


def word_tokenizer(directory):
    """A tokenizer of whole words, with the special tokens of BERT around one text or a pair of them."""
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


class Server(ThreadingHTTPServer):
    """Answers with what `answers` gives, one after another, and the last one from then on."""

    def __init__(self, *answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.headers = list(answers), [], []
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.headers.append(self.headers.get("Authorization"))
        answers = self.server.answers
        status, text = answers.pop(0) if len(answers) > 1 else answers[0]
        if status == 0:  # no answer at all
            self.server.released.wait(60)
            return
        text = text(body) if callable(text) else text
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass
