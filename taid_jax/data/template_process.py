"""The process that chat templates run in: they are programs of whoever made the model.

Started by `template.py` as a script, with nothing of this package. It reads a request
a line from its standard input and answers each by a line. A template that computes for
too long is ended by the kernel, and the process with it; one that asks for too much
memory does not get it.
"""

import datetime
import json
import signal
import sys
from typing import Any

_KERNEL_MEMORY = "/proc/self/statm"


def _limit_memory(more: int) -> None:
    """Lets the process grow by so many bytes, where the system can limit that."""
    try:
        import resource

        with open(_KERNEL_MEMORY) as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, OSError, ValueError):
        pass


def _fix_clock(day: dict[str, str]) -> None:
    """Has templates see one date, which requests name, and not the clock."""
    import jinja2

    make = jinja2.Environment.from_string

    def strftime_now(form: str) -> str:
        return datetime.datetime.fromisoformat(day["date"]).strftime(form)

    def from_string(self: jinja2.Environment, *arguments: Any, **options: Any) -> Any:
        self.globals["strftime_now"] = strftime_now
        return make(self, *arguments, **options)

    jinja2.Environment.from_string = from_string


def _answer(request: dict[str, Any], render: Any, error: type[Exception]) -> list[Any]:
    """Returns what each render gave."""
    found: list[Any] = []
    for stop, generation in request["cuts"]:
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            [text], _ = render(
                conversations=[request["messages"][:stop]],
                chat_template=request["template"],
                add_generation_prompt=generation,
                **request["options"],
            )
        except MemoryError:
            found.append(["limit", "asks for too much memory"])
            break
        except Exception as problem:
            # `raise_exception` of a template: it has looked at what it was given.
            kind = "refused" if type(problem) is error else "broken"
            said = str(problem) if kind == "refused" else f"{problem!r}"
            found.append([kind, said[:1000]])
            continue
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if len(text) > request["characters"]:
            found.append(["limit", f"writes {len(text):,} characters"])
            break
        found.append(["text", text])
    return found


def main() -> None:
    """Answers requests until there are no more."""
    # Whoever is stopped by Ctrl-C ends this process by closing its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = sys.stdout.buffer
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    day: dict[str, str] = {}
    _fix_clock(day)
    _limit_memory(int(sys.argv[1]))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        day["date"] = request["date"]
        found = _answer(request, render_jinja_template, jinja2.TemplateError)
        out.write(json.dumps(found).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
