"""Where a server's limits lie: how latency rises with the rate (`sweep`), and the highest rate within an SLO (`search`).

| file | what it decides |
|---|---|
| `clauses` | what a level of load shows of each limit: its figure over the limit, misses, effective sample size |
| `saturation` | whether a server falls behind the rate it is offered, tested while the level runs |
| `posterior` | what all levels so far say of the highest rate |
| `search` | which rate to try next, for how long, and when to stop |
| `levels` | which rates a sweep tries, and where its curve bends |
| `running` | the only one that runs anything: a level as a load test |

All but `running` are pure: a search runs as well on a simulated queue as on a server.
"""
