"""`outrider bench ...`: the measurements by name.

The runtime never imports what measures it: modules are named by string and imported when called.
"""

import typer

from . import bench_decode, bench_kernels, bench_results, bench_serve, replay

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Measure hit rates, speeds and bytes; each prints a table, or JSON with --json.",
)

app.command("hit-rate")(replay.hit_rate)
app.command()(bench_decode.decode)
app.command("serve")(bench_serve.serve)
app.command()(bench_kernels.kernels)
app.command()(bench_decode.make_geometry)
app.command()(bench_decode.make_gguf)
app.command("simulate")(replay.simulate)
app.command()(replay.validate)
app.command()(bench_results.transfer)
app.command()(bench_results.compare)
app.command()(bench_results.report)
app.command()(bench_results.schema)
