"""`flaxcompress generate`: text continued."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Annotated, Any, ClassVar

from tyro.conf import arg

from flaxcompress.cli.command import Debug, JsonFile, ModelName, Verb
from flaxcompress.cli.files import check_file, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Verb):
    """Continues a text, token by token as they come; the likeliest tokens unless a temperature is given.

    With --chat and no prompt, every line of standard input is a turn of one conversation.

    For example: flaxcompress generate stories260K/ --prompt Once --max-new-tokens 100
    """

    keeps_memory: ClassVar = True
    model: ModelName
    prompt: Annotated[str | None, arg(metavar="TEXT", help="what to continue, or to translate")] = None
    max_new_tokens: Annotated[int, arg(metavar="N", help="tokens at most")] = 64
    temperature: Annotated[float, arg(metavar="T", help="above 0, tokens are drawn")] = 0.0
    top_k: Annotated[int | None, arg(metavar="K", help="draw among the K likeliest tokens")] = None
    top_p: Annotated[float | None, arg(metavar="P", help="draw among the likeliest that make up probability P")] = None
    repetition_penalty: Annotated[float, arg(metavar="X", help="above 1, tokens seen before get less likely")] = 1.0
    beams: Annotated[int, arg(metavar="N", help="beam search with N beams")] = 1
    stop: Annotated[tuple[str, ...], arg(metavar="TEXT", help="texts at which to stop")] = ()
    chat: Annotated[bool, arg(help="put the prompt into the checkpoint's chat template")] = False
    seed: Annotated[int, arg(metavar="N", help="decides what is drawn")] = 0
    json_file: JsonFile = None
    debug: Debug = False

    def run(self) -> Any:
        """Returns the table."""
        import jax
        from rich.table import Table
        from rich.text import Text

        from flaxcompress.decoding.chat import render_chat
        from flaxcompress.evaluate.report import versions
        from flaxcompress.folder import load

        check_file(self.json_file)
        if self.prompt is None and not self.chat:
            raise ValueError("generate: give --prompt, or --chat to converse")
        if self.prompt is None and (self.beams > 1 or self.json_file is not None):
            raise ValueError("generate: a conversation goes with neither --beams nor --json")
        model = load(self.model)
        if self.prompt is None:
            return self._converse(model)
        prompt: Any = self.prompt
        if self.chat:
            prompt = render_chat(model.assets, [{"role": "user", "content": self.prompt}])
        times: list[float] = []

        def show(_: int, __: int, text: str) -> None:
            times.append(time.perf_counter())
            sys.stdout.write(text)
            sys.stdout.flush()

        key = jax.random.key(self.seed) if self.temperature else None
        start = time.perf_counter()
        answer = model.generate(
            prompt,
            max_new_tokens=self.max_new_tokens,
            key=key,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            beams=self.beams,
            stop=self.stop,
            on_token=show if self.beams == 1 and not self.stop else None,
            return_ids=True,
        )
        seconds = time.perf_counter() - start
        sys.stdout.write("\n" if times else answer.text + "\n")
        rate = (len(times) - 1) / max(times[-1] - times[0], 1e-9) if len(times) > 1 else len(answer.ids) / seconds
        found = {
            "model": self.model,
            "prompt": self.prompt,
            "text": answer.text,
            "ids": answer.ids,
            "finished": answer.finished,
            "seconds": seconds,
            "tokens_per_second": rate,
            "versions": versions(),
        }
        write_json(self.json_file, found)
        table = Table(title=Text(f"continued by {self.model}"))
        for header in ("tokens", "seconds, compiling included", "tokens per second"):
            table.add_column(header, justify="right")
        table.add_column("ended")
        table.add_row(
            f"{len(answer.ids)}", f"{seconds:.2f}", f"{rate:,.0f}", "yes" if answer.finished else "at the limit"
        )
        return table

    def _converse(self, model: Any) -> Any:
        """A conversation on standard input and output, a turn per line; returns the table of turns."""
        import jax
        from rich.table import Table
        from rich.text import Text

        chat = model.chat()
        table = Table(title=Text(f"conversation with {self.model}"))
        for header in ("turn", "tokens in the cache", "seconds"):
            table.add_column(header, justify="right")
        for turn, line in enumerate(sys.stdin, 1):
            if not line.strip():
                continue
            start = time.perf_counter()
            chat.say(
                line.rstrip("\n"),
                max_new_tokens=self.max_new_tokens,
                key=jax.random.key(self.seed + turn) if self.temperature else None,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                repetition_penalty=self.repetition_penalty,
                stop=self.stop,
                on_token=lambda _, __, text: (sys.stdout.write(text), sys.stdout.flush()),
            )
            sys.stdout.write("\n")
            table.add_row(f"{turn}", f"{len(chat.ids)}", f"{time.perf_counter() - start:.2f}")
        return table
