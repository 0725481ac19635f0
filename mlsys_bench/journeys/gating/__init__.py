"""gate run: two sides measured in pairs of launches until the gate can decide.

run.py         the journey: two sides as typed, the loop, the record it leaves
source.py      what a side is measured from, as the loop sees it
subjects.py    git refs and wheels as folders with an environment
environments.py  dependencies of a side, installed once by digest
worker.py      a side's worker process, from outside: hello, turns, its end
benchmarks.py  this project's own benchmarks behind that protocol, from inside; sending.py that of the load generator
pairs.py       the loop: launch, turn about, decide
interrupts.py  a Ctrl-C never falls between a start and the note of it
view.py        what a person sees meanwhile
outside.py     what is no benchmark of ours, as typed: commands.py (perf.py counts instructions), urls.py (servers.py starts them)
running.py     one run of a command to its end; stopwatch.py is the small process that measures it
outputs.py     what is left for a CI system; calibrating.py is `gate calibrate`: the same program on both sides
conditions.py  what surrounded the launches, and whether it disturbed them; proc.py and gpus.py look
"""
