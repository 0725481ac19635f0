"""A replica in virtual time, as loops over arrays: `batching` decides what a step computes, a latency profile says how long it takes.

Steps that hold nothing but one decode of everyone seated are done many at once (`_jump`), so cost grows with events, not with tokens.
Run as they stand over lists, or compiled over arrays: `core` builds either.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from mlsys_bench.batching.arrays import (
    BLOCKS,
    COMPUTED,
    COUNTERS,
    ENDED,
    EVEN,
    FATE,
    FINAL,
    FIRST,
    GATE,
    HELD,
    KNOWN,
    LUCK,
    MOVED,
    OUT_ROW,
    OUT_START,
    OUT_TOKENS,
    PREFIX_TOKENS,
    PROMPT,
    QUEUED,
    SEATED,
    SEATS,
    TOKEN_AT,
    Arrays,
    Limits,
    Policy,
)
from mlsys_bench.batching.kernel import enter, fit, leave, plan
from mlsys_bench.batching.prefix import evict
from mlsys_bench.latency.kernel import seconds

# counters of a simulated replica, after those of `batching`
FLYING, ENDING, DONE, STEPS, LINES, STRIDE, LEFT = range(21, 28)  # LEFT: without a seat when the last step was planned
assert LEFT < COUNTERS
# its times: now, or the end of the step in flight; sum of steps; since when gaps count; sums of batch and of KV tokens over time; tokens;
# batch and KV tokens of the last step
AT, BUSY, FROM, SEQS_S, KV_S, TOKENS, LAST_SEQS, LAST_KV = range(8)
TIMES = 8
ARRIVED, STARTED, FIRST_S, LAST_S, WORST = range(5)  # of books: when it came, got its first step, first token, last token; longest gap
BOOKS = 5
# of lines: end of the step, sequences in it, KV tokens held, requests without a seat; sum of steps so far
LINE_S, LINE_BATCH, LINE_KV, LINE_QUEUE, LINE_BUSY = range(5)
SERIES = 5

BINS_PER_E = 256  # bins of the gaps between tokens: each 0.4 % wide
LEAST_S = 1e-6
BINS = 6144  # to 26,000 s
NEVER, IN_SYSTEM, ANSWERED, CANCELLED, REFUSED, FULL = 0, 1, 200, 499, 400, 429  # fates of requests
RANDOM, LEAST_LOADED, POWER_OF_TWO = range(3)
_MULTIPLIER, MODULUS = 48271, 2147483647  # MINSTD: Park, Miller and Stockmeyer (1993)


class Station(NamedTuple):
    """One replica and what is kept of its past."""

    a: Arrays
    times: Any  # [TIMES]
    needs: Any  # scratch: by step of a jump, how many rows need a block; all zero in between
    ends_s: Any  # scratch: when each step of a jump ends
    gaps: Any  # [BINS] gaps between tokens that ended after times[FROM]
    lines: Any  # [SERIES, n] timeline: every counts[STRIDE]th step
    books: Any  # [BOOKS, rows] times of the requests
    done: Any  # the last rows that ended, as a ring
    token_s: Any  # when a row got its tokens, from rows[TOKEN_AT][row]; empty where they are not kept


# ---------------------------------------------------------------- requests


def offer(s: Station, row: int, at_s: float, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> None:
    """Take in a request at a time to which the station has been brought.  It joins the next step."""
    counts = s.a.counts
    if counts[SEATED] + counts[QUEUED] == 0 and s.times[AT] < at_s:
        s.times[AT] = at_s
    enter(s.a, row, prompt_tokens, output_tokens, cached_tokens)
    s.a.rows[FATE][row] = IN_SYSTEM
    s.books[ARRIVED][row] = at_s


def is_full(s: Station, limits: Limits, policy: Policy, places: int) -> bool:
    """Say whether `places` requests or more wait that the next step will not seat: a server answers 429 then.

    Nobody behind those that the last step left without a seat, for want of seats, memory or tokens, has one before them.
    """
    counts = s.a.counts
    waiting, seated = counts[QUEUED], counts[SEATED]
    stuck = waiting > 0 and (counts[LEFT] > 0 or (policy.gather > 0 and seated > 0))
    return bool(waiting >= places and (stuck or seated + waiting >= limits.max_seqs + places))


def withdraw(s: Station, policy: Policy, row: int) -> None:
    """Forget a request that is in the system; the step in flight still takes its time."""
    counts = s.a.counts
    kept = 0
    for i in range(counts[ENDING]):
        if s.a.slots[ENDED][i] != row:
            s.a.slots[ENDED][kept] = s.a.slots[ENDED][i]
            kept += 1
    counts[ENDING] = kept
    leave(s.a, policy, row)
    s.a.rows[FATE][row] = CANCELLED


# ---------------------------------------------------------------- time


def advance(s: Station, limits: Limits, policy: Policy, table: Any, until_s: float, to_an_end: bool) -> int:
    """End every step that ends by `until_s` and begin those that begin before it; return how many requests ended.

    A step due exactly at `until_s` is not begun yet, so that whoever arrives at that moment is in it.  With `to_an_end` it stops once
    somebody has ended.
    """
    counts, times = s.a.counts, s.times
    before = counts[DONE]
    while True:
        if counts[FLYING]:
            if times[AT] > until_s:
                break
            for i in range(counts[ENDING]):
                row = s.a.slots[ENDED][i]
                leave(s.a, policy, row)
                s.a.rows[FATE][row] = ANSWERED
                s.done[counts[DONE] % len(s.done)] = row
                counts[DONE] += 1
            counts[FLYING] = counts[ENDING] = 0
            if to_an_end and counts[DONE] > before:
                break
        if counts[SEATED] + counts[QUEUED] == 0 or times[AT] >= until_s:
            break
        if policy.gather and counts[SEATED] == 0 and not _gathered(s, limits, policy, until_s):
            break
        if _jump(s, limits, policy, table, until_s) == 0:
            _step(s, limits, policy, table)
    return int(counts[DONE] - before)


def _gathered(s: Station, limits: Limits, policy: Policy, until_s: float) -> bool:
    """Say whether the next batch can begin before `until_s`, and open the gate for it: it is full or its oldest has waited enough."""
    counts, times = s.a.counts, s.times
    due_s = s.books[ARRIVED][counts[FIRST]] + policy.gather_s
    due_s = min(due_s, until_s)  # both infinite: nobody comes any more, and nobody would ever be served
    if counts[QUEUED] < limits.max_seqs and times[AT] < due_s < math.inf:
        times[AT] = due_s
        if times[AT] >= until_s:
            return False
    counts[GATE] = min(counts[QUEUED], limits.max_seqs)
    return True


def _step(s: Station, limits: Limits, policy: Policy, table: Any) -> None:
    """Begin the next step, whatever it holds, and record what will be when it ends."""
    a, times = s.a, s.times
    counts, prompt, known = a.counts, a.rows[PROMPT], a.rows[KNOWN]
    counts[EVEN] = counts[MOVED] = 0
    n, _ = plan(a, limits, policy, 0, limits.max_step_tokens)
    counts[LEFT] = counts[QUEUED]
    assert n > 0, "nobody can be scheduled though somebody is there"
    now_s, started = times[AT], s.books[STARTED]
    out_row, out_start, out_tokens = a.slots[OUT_ROW], a.slots[OUT_START], a.slots[OUT_TOKENS]
    decodes = reads = chunks = sampled = 0
    pairs = 0.0
    for i in range(n):
        row, past, tokens = out_row[i], out_start[i], out_tokens[i]
        if started[row] < 0.0:
            started[row] = now_s
        if past >= prompt[row] and (tokens == 1 or past == known[row] - 1):
            decodes += tokens
            reads += past + tokens
            if past == known[row] - 1:
                sampled += tokens
        else:
            chunks += tokens
            pairs += tokens * (past + 0.5 * tokens)
            sampled += past + tokens == known[row]
    step_s = seconds(table, float(decodes), float(reads), float(chunks), pairs, float(sampled)) + counts[MOVED] * policy.move_s
    end_s = _pass(s, step_s, n, (limits.blocks - counts[BLOCKS]) * limits.block_tokens, counts[QUEUED])
    counts[EVEN] = _grow(s, policy, n, end_s) == counts[SEATED] and policy.drafts == 0
    counts[FLYING] = 1


def _grow(s: Station, policy: Policy, n: int, end_s: float) -> int:
    """Record what the n rows of a step will have got when it ends; return how many of them get tokens.

    Arrays have names of their own, and a gap's bin is looked up once for all who share it: in plain Python this loop is most of a run.
    """
    a, counts = s.a, s.a.counts
    prompt, known, computed, final, token_at = a.rows[PROMPT], a.rows[KNOWN], a.rows[COMPUTED], a.rows[FINAL], a.rows[TOKEN_AT]
    out_row, out_start, out_tokens, ended = a.slots[OUT_ROW], a.slots[OUT_START], a.slots[OUT_TOKENS], a.slots[ENDED]
    first_s, last_s, worst_s, token_s, gaps = s.books[FIRST_S], s.books[LAST_S], s.books[WORST], s.token_s, s.gaps
    keeps, counted = len(token_s) > 0, end_s >= s.times[FROM]
    usual_s, usual_bin = 0.0, 0
    grown = made = 0
    for i in range(n):
        row, past = out_row[i], out_start[i]
        had = known[row]
        drafts = out_tokens[i] - (had - past)
        if drafts < 0:  # its prefill goes on
            computed[row] = past + out_tokens[i]
            continue
        new = 1 + _accepted(counts, policy, drafts) if drafts > 0 else 1
        number = had - prompt[row]
        if keeps:
            for j in range(token_at[row] + number, token_at[row] + number + new):
                token_s[j] = end_s
        if number == 0:
            first_s[row] = end_s
        else:
            gap_s = end_s - last_s[row]
            if gap_s > worst_s[row]:
                worst_s[row] = gap_s
            if counted:
                if gap_s != usual_s:
                    usual_s, usual_bin = gap_s, bin_of(gap_s)
                gaps[usual_bin] += 1
                gaps[0] += new - 1
        last_s[row] = end_s
        known[row] = had + new
        computed[row] = had + new - 1
        made += new
        grown += 1
        if had + new == final[row]:
            ended[counts[ENDING]] = row
            counts[ENDING] += 1
    s.times[TOKENS] += made
    return grown


def _accepted(counts: Any, policy: Policy, drafts: int) -> int:
    """Draw how many drafts are right: the first ones, up to the first that is wrong."""
    right = 0
    while right < drafts:
        counts[LUCK] = counts[LUCK] * _MULTIPLIER % MODULUS
        if counts[LUCK] >= policy.acceptance * MODULUS:
            break
        right += 1
    return right


def _pass(s: Station, step_s: float, batch: int, kv_tokens: int, waiting: int) -> float:
    """Let the time of a step pass and write it down; return when it ends."""
    assert 0.0 < step_s < math.inf, "a clock must give every step a positive, finite time"
    counts, times = s.a.counts, s.times
    times[AT] += step_s
    times[BUSY] += step_s
    times[SEQS_S] += step_s * batch
    times[KV_S] += step_s * kv_tokens
    times[LAST_SEQS], times[LAST_KV] = batch, kv_tokens
    counts[STEPS] += 1
    if counts[STEPS] % counts[STRIDE] == 0:
        if counts[LINES] == len(s.lines[0]):
            thin(s)
        if counts[STEPS] % counts[STRIDE] == 0:
            i = counts[LINES]
            s.lines[LINE_S][i], s.lines[LINE_BATCH][i] = times[AT], batch
            s.lines[LINE_KV][i], s.lines[LINE_QUEUE][i] = kv_tokens, waiting
            s.lines[LINE_BUSY][i] = times[BUSY]
            counts[LINES] = i + 1
    return float(times[AT])


def thin(s: Station) -> None:
    """Keep every other line of the timeline, those of even steps."""
    counts = s.a.counts
    kept = 0
    for i in range(counts[LINES]):
        if i % 2 == 1:
            for line in range(SERIES):
                s.lines[line][kept] = s.lines[line][i]
            kept += 1
    counts[LINES] = kept
    counts[STRIDE] *= 2


def bin_of(gap_s: float) -> int:
    """Return the bin of a gap; the last one holds all that is longer, the first all shorter."""
    if gap_s <= LEAST_S:
        return 0
    return min(int(math.log(gap_s / LEAST_S) * BINS_PER_E) + 1, BINS - 1)


# ---------------------------------------------------------------- many steps at once


def _jump(s: Station, limits: Limits, policy: Policy, table: Any, until_s: float) -> int:
    """Do the steps ahead in which all those seated decode and nobody else computes, as far as they begin before `until_s`.

    They last until the first answer ends or a block is missing; what the steps hold is the same as one by one.  Returns how many.
    """
    a, times = s.a, s.times
    counts, seats, known, final, held = a.counts, a.slots[SEATS], a.rows[KNOWN], a.rows[FINAL], a.rows[HELD]
    n, block_tokens = counts[SEATED], limits.block_tokens
    if not counts[EVEN] or n == 0 or n > limits.max_step_tokens or _next_fits(a, limits, policy):
        return 0
    needs, most = s.needs, len(s.needs)
    steps, reads = len(s.ends_s), 0
    if block_tokens > most:
        steps = min(steps, most)
    for i in range(n):
        row = seats[i]
        knows = known[row]
        reads += knows
        if final[row] - knows < steps:
            steps = final[row] - knows
        ahead = held[row] * block_tokens + 1 - knows
        if ahead < most:
            needs[ahead] += 1
    kv_tokens, waiting = (limits.blocks - counts[BLOCKS]) * block_tokens, counts[QUEUED]
    counts[LEFT] = waiting
    free, j, worst_s = counts[BLOCKS], 0, 0.0
    while j < steps and times[AT] < until_s:
        needed = needs[j % block_tokens]
        if needed > free:
            break
        free -= needed
        kv_tokens += needed * block_tokens
        begun_s = times[AT]
        s.ends_s[j] = _pass(s, seconds(table, float(n), float(reads), 0.0, 0.0, float(n)), n, kv_tokens, waiting)
        reads += n
        gap_s = s.ends_s[j] - begun_s
        if s.ends_s[j] >= times[FROM]:
            s.gaps[bin_of(gap_s)] += n
        if gap_s > worst_s:
            worst_s = gap_s
        j += 1
    counts[BLOCKS] = free
    if counts[PREFIX_TOKENS] > 0:
        evict(a, policy)
    _settle(s, block_tokens, j, worst_s)
    return int(j)


def _settle(s: Station, block_tokens: int, j: int, worst_s: float) -> None:
    """Write down by row what j steps of a jump did, and clear the scratch."""
    a, times = s.a, s.times
    counts, seats, prompt, known, final = a.counts, a.slots[SEATS], a.rows[PROMPT], a.rows[KNOWN], a.rows[FINAL]
    computed, held, token_at, ended = a.rows[COMPUTED], a.rows[HELD], a.rows[TOKEN_AT], a.slots[ENDED]
    needs, ends_s, token_s, last_s, worst = s.needs, s.ends_s, s.token_s, s.books[LAST_S], s.books[WORST]
    most, keeps, now_s = len(needs), len(token_s) > 0, times[AT]
    for i in range(counts[SEATED]):
        row = seats[i]
        had = known[row]
        ahead = held[row] * block_tokens + 1 - had
        if ahead < most:
            needs[ahead] = 0
        if j == 0:
            continue
        if keeps:
            at = token_at[row] + had - prompt[row]
            token_s[at : at + j] = ends_s[:j]
        knows = had + j
        known[row] = knows
        computed[row] = knows - 1
        held[row] = (knows - 2 + block_tokens) // block_tokens
        last_s[row] = now_s
        if worst_s > worst[row]:
            worst[row] = worst_s
        if knows == final[row]:
            ended[counts[ENDING]] = row
            counts[ENDING] += 1
    if j > 0:
        times[TOKENS] += j * counts[SEATED]
        counts[FLYING] = 1


def coming_s(s: Station, limits: Limits, policy: Policy, table: Any) -> float:
    """Return a time before which no request ends when none ends with the step in flight.

    Steps of a jump read ever more of the cache, so none is shorter than the first; until memory is short and a smaller batch steps faster.
    """
    a, at_s = s.a, s.times[AT]
    counts, n, block_tokens = a.counts, a.counts[SEATED], limits.block_tokens
    if policy.gather and n == 0 and counts[QUEUED] < limits.max_seqs:
        return float(max(at_s, s.books[ARRIVED][counts[FIRST]] + policy.gather_s))
    if not counts[EVEN] or n == 0 or n > limits.max_step_tokens or _next_fits(a, limits, policy):
        return float(at_s)
    steps, reads = len(s.ends_s), 0
    for i in range(n):
        row = a.slots[SEATS][i]
        reads += a.rows[KNOWN][row]
        steps = min(steps, a.rows[FINAL][row] - a.rows[KNOWN][row])
    missing = -counts[BLOCKS]
    for i in range(n):
        row = a.slots[SEATS][i]
        missing += max(0, (a.rows[KNOWN][row] + steps - 2 + block_tokens) // block_tokens - a.rows[HELD][row])
    if missing > 0:  # a row takes no more than one block in as many steps as a block has tokens
        steps = min(steps, 1 + counts[BLOCKS] // n * block_tokens)
    return float(at_s + (steps - 1) * seconds(table, float(n), float(reads), 0.0, 0.0, float(n)))


def _next_fits(a: Arrays, limits: Limits, policy: Policy) -> bool:
    """Say whether the first that waits could be admitted beside, or before, a decode of all those seated, their new blocks left aside."""
    counts = a.counts
    budget = limits.max_step_tokens
    if not policy.prefill_first or policy.mixed:
        budget -= counts[SEATED]
    if counts[QUEUED] == 0 or counts[SEATED] == limits.max_seqs or counts[GATE] <= 0 or budget <= 0:
        return False
    fits, _ = fit(a, limits, policy, counts[FIRST], budget)
    return bool(fits)


# ---------------------------------------------------------------- whole runs


class Stations(NamedTuple):
    """Equal replicas: what belongs to one, with a first axis for the replicas; the rest is shared."""

    counts: Any
    slots: Any
    prefixes: Any
    times: Any
    gaps: Any
    lines: Any
    done: Any


def one(all_: Stations, s: Station, r: int) -> Station:
    """Return replica r of many that share the rows and the scratch of `s`."""
    a = s.a
    mine = Arrays(all_.counts[r], all_.slots[r], a.rows, a.hashes, all_.prefixes[r], a.block_table, a.free_blocks, a.free_rows)
    return Station(mine, all_.times[r], s.needs, s.ends_s, all_.gaps[r], all_.lines[r], s.books, all_.done[r], s.token_s)


def drive(
    all_: Stations,
    size: int,
    s: Station,
    limits: Limits,
    policy: Policy,
    table: Any,
    routing: int,
    drawn: Any,
    other: Any,
    places: int,
    users: int,
    pause_s: float,
    stop_s: float,
) -> None:
    """Play all requests, in order of their arrival, on `size` replicas chosen by `routing`, until `stop_s`.

    By row, `s` holds ARRIVED, PROMPT and FINAL, and REFUSED as the fate of those that can never run.  `drawn`: the replica of each
    request (or its first candidate, `other` the second); `other` is left holding those that took them.  A replica whose queue
    has `places` taken refuses more.  With `users`, of one replica, only so many come by themselves; each other comes `pause_s` after one
    before it has ended.  A request that knows more than its prompt was begun elsewhere, and brings its cache.
    """
    arrived_s, fate, prompt, final = s.books[ARRIVED], s.a.rows[FATE], s.a.rows[PROMPT], s.a.rows[FINAL]
    known, last_s = s.a.rows[KNOWN], s.books[LAST_S]
    n = len(arrived_s)
    i, given = 0, min(users, n) if users > 0 else n
    while True:
        comes = i < given and arrived_s[i] <= stop_s
        at_s = arrived_s[i] if comes else stop_s
        candidates = 1 if comes and routing == RANDOM else 2 if comes and routing == POWER_OF_TWO else size
        chosen, least, ended = 0, -1, 0
        for k in range(candidates):
            r = (i + k) % size  # ties go round
            if comes and routing != LEAST_LOADED:
                r = drawn[i] if k == 0 else other[i]
            mine = one(all_, s, r)
            ended += advance(mine, limits, policy, table, at_s, users > 0)
            load = mine.a.counts[SEATED] + mine.a.counts[QUEUED]
            if least < 0 or load < least:
                chosen, least = r, load
        if users > 0 and ended > 0:
            at_s = one(all_, s, 0).times[AT]
        elif not comes:
            break
        else:
            if is_full(one(all_, s, chosen), limits, policy, places):
                fate[i] = FULL
            elif fate[i] == REFUSED:
                ended = 1
            else:
                begun = known[i] - prompt[i]
                offer(one(all_, s, chosen), i, at_s, prompt[i], final[i] - prompt[i], prompt[i] if begun > 0 else 0)
                known[i] += begun
                last_s[i] = at_s
                other[i] = chosen
            i += 1
        while users > 0 and ended > 0 and given < n:
            arrived_s[given] = at_s + pause_s
            given += 1
            ended -= 1
