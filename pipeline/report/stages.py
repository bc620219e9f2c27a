"""What each stage did, in a few plain sentences: asked against reached, and why a choice was made.

One function a kind of stage, reading that stage's metrics. One that this file does not know shows its plain numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .numbers import big, count, interval, percent, points, ratio, significant, size
from .reading import listing, mapping, number, text
from .steps import Step


def deeds(step: Step) -> tuple[str, ...]:
    """Sentences on what the stage did; none when its artifact is missing."""
    if not step.manifest:
        return ()
    say = _SAYS.get(step.stage, _other)
    return tuple(sentence for sentence in say(step.metrics) if sentence)


def _ticket(metrics: Mapping[str, Any]) -> list[str]:
    said = []
    for what, kept in (("Examples", "kept"), ("Patches", "kept_per_image")):
        chosen = mapping(metrics, what.lower())
        if number(chosen, kept) is None:
            continue
        kept_, of = number(chosen, kept), number(chosen, "of")
        if kept_ == of:
            said.append(f"{what}: all {count(of)} kept{' in each image' if what == 'Patches' else ''}.")
            continue
        share = f" ({percent(kept_ / of)})" if kept_ is not None and of else ""
        asked = f", asked {percent(number(chosen, 'keep'))}" if number(chosen, "keep") is not None else ""
        an_image = " in each image" if what == "Patches" else ""
        name = text(chosen, "method")
        method = " by lot" if name.startswith("random") else f" by {name}" if name else ""
        said.append(f"{what}{method}: kept {count(kept_)} of {count(of)}{share}{an_image}{asked}.")
    return [*said, *_ticket_cost(mapping(metrics, "patches", "cost"))]


def _ticket_cost(cost: Mapping[str, Any]) -> list[str]:
    """What training on a ticket costs, cached and online, whichever was chosen."""
    dense, cached, online = (number(cost, name) for name in ("dense", "cached", "online"))
    if not dense or cached is None or online is None:
        return []
    looking = f", {big(online)} ({percent(online / dense)}) with the selector looking at every view (online)"
    return [
        f"Training on one image takes {big(dense)} MACs whole, {big(cached)} ({percent(cached / dense)}) on its ticket"
        f"{looking if online > cached else ''}."
    ]


def _train(metrics: Mapping[str, Any]) -> list[str]:
    whole, tickets = number(metrics, "top1", "all"), number(metrics, "top1", "tickets")
    said = []
    if whole is not None:
        policy = text(metrics, "policy")  # "reduced to 40 patches": the network itself drops tokens
        seen = f"with its tokens {policy}" if policy.startswith("reduced") else "with all patches"
        said.append(f"Top-1 {percent(whole)} on the test split {seen}.")
    if tickets is not None:
        said.append(f"Top-1 {percent(tickets)} on the test split with ticket patches only.")
    curve = listing(metrics, "curve")
    if curve and (last := number(curve[-1], "loss")) is not None:
        first = number(curve[0], "loss")
        way = f"{significant(first)} → " if len(curve) > 1 and first is not None else ""
        said.append(f"Loss {way}{significant(last)} after {len(curve)} epoch{'' if len(curve) == 1 else 's'}.")
    pool = mapping(metrics, "examples")  # examples that came and went while training
    if number(pool, "share") is not None:
        said.append(
            f"Examples by {text(pool, 'policy')}: trained on {count(number(pool, 'images'))} images where all "
            f"{count(number(pool, 'of'))} in each of {count(number(pool, 'passes'))} passes would have been "
            f"{count(number(pool, 'images_of_all'))} ({percent(number(pool, 'share'))})."
        )
    said += _masks(mapping(metrics, "masks"))
    budget = mapping(metrics, "budget")
    if number(budget, "steps") is not None:
        allowed = f" of {big(number(budget, 'allowed'))} allowed" if number(budget, "allowed") is not None else ""
        said.append(
            f"Budget in {text(budget, 'budget')}: {count(number(budget, 'steps'))} steps on "
            f"{count(number(budget, 'examples'))} of {count(number(budget, 'of'))} images, "
            f"{big(number(budget, 'macs'))} MACs of training"
            f"{f' after {big(before)} of choosing' if (before := number(budget, 'scoring_macs')) else ''}{allowed}."
        )
    if number(metrics, "parameters") is not None:
        said.append(f"{big(number(metrics, 'parameters'))} parameters, {big(number(metrics, 'macs'))} MACs an image.")
    return said


def _masks(masks: Mapping[str, Any]) -> list[str]:
    """How many weights are not zero, what was tried for it, and what other fractions would have given."""
    density = number(masks, "density", "global")
    if density is None:
        return []
    asked = f", asked {percent(number(masks, 'keep'))}" if number(masks, "keep") is not None else ""
    before = f", {percent(number(masks, 'before', 'global'))} before" if mapping(masks, "before") else ""
    of = count(number(masks, "density", "weights"))
    said = [f"Weights by {text(masks, 'method')}: {percent(density)} of {of} are not zero{asked}{before}."]
    tried = mapping(masks, "tried")  # of essential it is a list of levels, which the figure shows
    if tried:
        answers = ", ".join(f"{name} {percent(number(tried, name))}" for name in tried)
        said.append(f"On the calibration split: {answers}; taken: {text(masks, 'chosen')}.")
    if number(masks, "bend") is not None:
        said.append(f"Accuracy bends most at {percent(number(masks, 'bend'))} kept.")
    rates = [f"{percent(number(row, 'keep'))}: {percent(number(row, 'top1'))}" for row in listing(masks, "rates")]
    if rates:
        said.append(f"Weights kept after training, and top-1 on the test split: {', '.join(rates)}.")
    return said


def _prune(metrics: Mapping[str, Any]) -> list[str]:
    asked = ", ".join(_target(name, number(metrics, "asked", name)) for name in mapping(metrics, "asked"))
    reached = ", ".join(_target(name, number(metrics, "reached", name)) for name in mapping(metrics, "reached"))
    said = [f"Asked for {asked}; reached {reached}." if asked and reached else ""]
    rule, multiples = text(metrics, "allocation"), mapping(metrics, "multiples")
    if rule and multiples:
        said.append(
            f"Cut by {text(metrics, 'importance')}, allocation {rule}; widths are multiples of "
            f"{count(number(multiples, 'round_to'))}, in heads of {count(number(multiples, 'head_round_to'))}."
        )
    far = [_reach(row) for row in listing(metrics, "feasible")]
    if far:
        said.append(f"What would be left if one kind of part alone were cut as far as it goes: {'; '.join(far)}.")
    tried = [
        f"{significant(number(row, 'measured'))} (estimated {significant(number(row, 'estimated'))})"
        for row in listing(metrics, "candidates")
    ]
    if tried:
        said.append(
            f"Candidates as files, of {significant(number(listing(metrics, 'candidates')[0], 'asked'))} asked: "
            f"{', '.join(tried)}."
        )
    rounds = [
        f"{percent(number(row, 'macs'))} of MACs, {percent(number(row, 'top1_calibration_cut'))} cut and "
        f"{percent(number(row, 'top1_calibration'))} recovered"
        for row in listing(metrics, "rounds")
    ]
    if rounds:
        said.append(f"Rounds before the last cut, top-1 on the calibration split: {'; '.join(rounds)}.")
    cuts = []
    for name in ("macs", "parameters"):
        before, after = number(metrics, "before", name), number(metrics, "after", name)
        if before is not None and after is not None:
            cuts.append(f"{_unit(name)} {big(before)} → {big(after)}")
    if cuts:
        sentence = ", ".join(cuts)
        said.append(f"{sentence[0].upper()}{sentence[1:]}.")
    before_recovery = number(metrics, "top1_before_recovery")
    if before_recovery is not None:
        said.append(f"Top-1 {percent(before_recovery)} straight after the cut, before fine-tuning.")
    return said


def _target(name: str, value: float | None) -> str:
    """A target of prune, asked or reached: a share, or what a file is and takes."""
    match name:
        case "size_mb":
            return f"{significant(value)} MB"
        case "latency_ms":
            return f"{significant(value)} ms"
        case "speedup":
            return f"{significant(value)} times the speed"
        case _:
            return f"{percent(value)} of {_unit(name)}"


def _reach(row: Mapping[str, Any]) -> str:
    """Such as "mlp 41.2% of MACs, 38.0% of parameters, 1.92 times the speed by estimate"."""
    time = number(row, "time")
    fast = f", {significant(1 / time)} times the speed by estimate" if time else ""
    macs, params = percent(number(row, "macs")), percent(number(row, "params"))
    return f"{text(row, 'axis')} {macs} of MACs, {params} of parameters{fast}"


def _adopt(metrics: Mapping[str, Any]) -> list[str]:
    said = [f"{text(metrics, 'file')}: {text(metrics, 'signature')}, opset {count(number(metrics, 'opset'))}."]
    judged = count(number(mapping(metrics, "judged_on"), "images"))
    said.append(f"Top-1 {percent(number(metrics, 'top1'))} of {judged} calibration images.")
    said.append(f"{size(number(metrics, 'bytes'))}, {big(number(metrics, 'macs'))} MACs.")
    return said


def _export(metrics: Mapping[str, Any]) -> list[str]:
    parity = mapping(metrics, "parity")
    said = []
    if number(parity, "max_abs") is not None:
        batches = " and ".join(map(str, listing(parity, "batches")))
        said.append(
            f"Parity with torch on {count(number(parity, 'images'))} held-out images: logits differ by at most "
            f"{_tiny(number(parity, 'max_abs'))}, same top-1 on {percent(number(parity, 'top1_agreement'))}"
            f"{f', at batch {batches}' if batches else ''}{_attention(mapping(parity, 'by_attention'))}."
        )
    nodes = mapping(metrics, "nodes")
    sets = mapping(parity, "kept_sets")
    if number(sets, "agreement") is not None:
        tied = number(sets, "tied")
        said.append(
            f"Tokens kept by {count(number(sets, 'blocks'))} blocks: the same on {percent(number(sets, 'agreement'))} "
            f"of the images{f', on {count(tied)} of them but for tokens of equal score' if tied else ''}."
        )
    if text(metrics, "input") == "pixels":
        said.append("The file takes raw pixels, uint8 [N, S, S, 3].")
    if nodes:
        total = sum(number(nodes, name) or 0 for name in nodes)
        norms = number(nodes, "LayerNormalization")
        said.append(f"{count(total)} nodes{f', {count(norms)} LayerNormalization' if norms else ''}.")
    said += _half(mapping(metrics, "half"))
    if number(metrics, "opset") is not None:
        said.append(f"Opset {count(number(metrics, 'opset'))}, {size(number(metrics, 'bytes'))}.")
    return said


def _half(told: Mapping[str, Any]) -> list[str]:
    if not isinstance(told.get("written"), bool):
        return []
    largest = f"{number(told, 'largest'):,.1f}" if number(told, "largest") is not None else "a number without bound"
    place = text(told, "module") or text(told, "node")
    if not told["written"]:
        return [f"No FP16 file: {place} reaches {largest}."]
    return [
        f"FP16: {size(number(told, 'bytes'))}, logits differ from FP32 by at most {_tiny(number(told, 'max_abs'))}, "
        f"same top-1 on {percent(number(told, 'top1_agreement'))}; the largest number is {largest}, in {place}."
    ]


def _attention(worst: Mapping[str, Any]) -> str:
    fused, plain = number(worst, "fused"), number(worst, "plain")
    return "" if fused is None or plain is None else ", against fused attention and plain products"


def _quantize(metrics: Mapping[str, Any]) -> list[str]:
    chosen, reason = text(metrics, "chosen"), text(metrics, "reason").rstrip(".")
    said = [f"Chosen: {chosen.upper()}{f', because {reason}' if reason else ''}." if chosen else ""]
    drop, allowed = number(metrics, "drop"), number(metrics, "max_drop")
    if drop is not None:
        limit = f", {points(allowed)} allowed" if allowed is not None else ""
        split = text(metrics, "judged_on", "split")
        where = f" on the {split} split" if split else ""
        said.append(
            f"Top-1{where}: FP32 {percent(number(metrics, 'top1', 'fp32'))} → "
            f"INT8 {percent(number(metrics, 'top1', 'int8'))} (drop {points(drop)}{limit})."
        )
    speed = mapping(metrics, "speedup")
    if number(speed, "ratio") is not None:
        within = interval(number(speed, "low"), number(speed, "high"), ratio)
        said.append(
            f"INT8 against FP32: {ratio(number(speed, 'ratio'))}{f' (95% interval {within})' if within else ''}."
        )
    timed = [row for row in listing(metrics, "forms") if number(row, "speedup") is not None]
    if timed:
        each = "; ".join(f"{text(row, 'form')} {ratio(number(row, 'speedup'))}" for row in timed)
        said.append(f"Forms tried, each with its speed-up over the float file: {each}.")
    if left := [str(group) for group in listing(metrics, "left_float")]:
        said.append(f"Left float, since INT8 lost too much with them: {', '.join(left)}.")
    for scheme, costs in mapping(metrics, "sensitivity").items():
        worst = ", ".join(f"{group} {number(costs, group):.2g}" for group in list(costs)[:3])
        scopes = ", ".join(f"{scope} {cost:.2g}" for scope, cost in by_scope(costs).items())
        said.append(f"Costliest in 8 bits ({scheme}; divergence of the answers, nats): {worst}. By scope: {scopes}.")
    before, after = number(metrics, "bytes", "fp32"), number(metrics, "bytes", "int8")
    if before is not None and after is not None:
        said.append(f"File {size(before)} → {size(after)}.")
    if number(metrics, "quantized_nodes") is not None:
        images = number(metrics, "calibration_images") if text(metrics, "form").startswith("static") else None
        on = f", calibrated on {count(images)} images" if images is not None else ""
        said.append(f"{count(number(metrics, 'quantized_nodes'))} nodes quantized{on}.")
    return said


def _benchmark(metrics: Mapping[str, Any]) -> list[str]:
    rows = listing(metrics, "rows")
    files = {(text(row, "arm"), text(row, "entry"), text(row, "variant")) for row in rows}
    said = [f"Files measured: {len(files)}, rows: {len(rows)}."]
    noise = number(metrics, "noise_floor", "percent")
    if noise is not None:
        said.append(f"Noise floor {noise:.1f}%.")
    if unsaid := text(metrics, "attribution", "unsaid"):
        said.append(f"No time by block: {unsaid}.")
    return said


def _other(metrics: Mapping[str, Any]) -> list[str]:
    plain = [f"{name.replace('_', ' ')} {text(metrics, name)}" for name in metrics if text(metrics, name)]
    return [f"{'; '.join(plain)}."] if plain else []


_SAYS: Mapping[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "ticket": _ticket,
    "train": _train,
    "finetune": _train,
    "prune": _prune,
    "export": _export,
    "adopt": _adopt,
    "quantize": _quantize,
    "benchmark": _benchmark,
}


def _unit(name: str) -> str:
    return {"macs": "MACs", "params": "parameters"}.get(name, name)


def _tiny(value: float | None) -> str:
    """Differences of logits: 2.4e-6, 0.0123."""
    return significant(value) if value is None or not 0 < value < 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def by_scope(costs: Mapping[str, Any]) -> dict[str, float]:
    """What 8 bits cost attention, MLPs and all other layers: the sum over half blocks, whose costs nearly add up."""
    found: dict[str, float] = {}
    for group in costs:
        last = group.rpartition(".")[2]
        scope = "attention" if "att" in last else "MLPs" if last in ("mlp", "intermediate") else "other layers"
        found[scope] = found.get(scope, 0.0) + (number(costs, group) or 0.0)
    return found
