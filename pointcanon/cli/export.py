"""``pointcanon export FILE -o OUT``: a program that runs without pointcanon."""

from __future__ import annotations

from pathlib import Path

from pointcanon.cli.options import (
    Parser,
    add_canonicalizer,
    add_vote,
    open_checkpoint,
    open_model,
)

__all__ = ["run"]

DESCRIPTION = """\
Write a checkpoint, ours or public, as a program that runs without pointcanon: OUT.onnx for ONNX
Runtime and others, OUT.pt2 for torch.export.load. It takes any number of clouds of any number of
points and answers with logits and, behind a canonicalizer, with the frames. It is compared with the
checkpoint, on random clouds and on the same turned, before OUT is written.
"""


def run(argv: list[str]) -> int:
    parser = Parser(prog="pointcanon export", description=DESCRIPTION)
    parser.add_argument("file", type=Path, help="the checkpoint")
    parser.add_argument("-o", "--out", type=Path, required=True, help="ends in .onnx or .pt2")
    add_canonicalizer(parser, "in front of the network, in the place of its own")
    add_vote(parser)
    options = parser.parse_args(argv)

    from pointcanon.export import export, require_format
    from pointcanon.files import require_writable

    out = require_writable(require_format(options.out))
    front = (options.canonicalizer, options.canonicalizer_options, options.vote)
    model = open_model(options.file, *front) if any(front) else open_checkpoint(options.file)
    differences = export(model, out)
    worst = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    print(f"{out}: differs from {options.file} by at most {worst}")
    return 0
