"""Trials of federation recipes in one process, as results/tuning.jsonl records them; a draft."""
import argparse, json, time, sys, copy
from pathlib import Path
import numpy as np, torch
from fedssl.config.compose import load_config
from fedssl.compute import choose_backend
from utils import *
from utils import open_images, build_method, build_views, build_schedule, build_train_settings, plain
from benchmarks.accuracy.tune import split_images
from fedssl.training.optimizers import build_optimizers
from fedssl.training.local import _batches, get_batch
from fedssl.training.schedule import cosine
from fedssl.training.representation import measure_representation
from fedssl.seeding import generator_for
from fedssl.evaluation.features import extract_features
from fedssl.evaluation.knn import knn_accuracy
from fedssl.evaluation.linear import train_linear_head
from fedssl.networks.state import load_state
from hydra.utils import instantiate
from dataclasses import replace
from sklearn.preprocessing import StandardScaler

p = argparse.ArgumentParser()
p.add_argument("--path"); p.add_argument("--name", default="")
p.add_argument("--momentum", default="fresh")        # fresh, averaged, local
p.add_argument("--outer", type=float, default=0.0)   # momentum
p.add_argument("--rate", type=float, default=1.0)
p.add_argument("--nesterov", action="store_true")
p.add_argument("--align", type=float, default=0.0)
p.add_argument("--recal", type=int, default=8)       # batches a client
p.add_argument("--each", action="store_true", help="recal in training loop too (buffers kept)")
p.add_argument("--turns", default="")  # clients per round, "1,1,2,5"
p.add_argument("--fedexp", action="store_true")
p.add_argument("--warm", type=int, default=0)
p.add_argument("--sync", action="store_true")  # average gradients-ish: batch of all
p.add_argument("--whiten", default="")
p.add_argument("--fixbn", type=int, default=0)  # from this round on
p.add_argument("--synth", type=float, default=0)  # negatives of others, times 2B each
p.add_argument("--last2", action="store_true")
p.add_argument("overrides", nargs="*")
a = p.parse_intermixed_args()
import os; torch.set_num_threads(int(os.environ.get("T", "1")))
config = load_config("config", [*(["dataset=cifar10"] if a.path else []), *a.overrides])
config.dataset.path = a.path
images = open_images(config, report=lambda *x: None).train
parts, labelled, held = split_images(images, config)
backend = choose_backend(config.precision)
method = build_method(config, backend.device)
schedule, settings, views = build_schedule(config), build_train_settings(config), build_views(config)
from fedssl.data.partitions import split_held_out
rows_of = [split_held_out(part, config.held_out) for part in parts]
n = config.num_clients
who_all = list(config.participants) or list(range(n))
pixels = images.pixels
params = dict(method.named_parameters())
bns = {k: m for k, m in method.named_modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}

def clone(): return {k: v.clone() for k, v in method.state_dict().items()}
def names_of(opts):
    ids = {id(v): k for k, v in params.items()}
    return ids

def whiten_stem():
    # eigenvectors of 3x3x3 patches over normalized images, half the filters +-; as airbench
    w = method.encoder.conv1.weight
    x = torch.from_numpy(np.array(pixels[np.sort(np.concatenate([r[0][:1000] for r in rows_of]))])).float()/255
    x = torch.nn.functional.interpolate(x, size=(16,16), mode="bilinear", antialias=True)
    x = (x - method.encoder.mean)/method.encoder.std
    patches = torch.nn.functional.unfold(x, 3).transpose(1,2).reshape(-1, 27)
    cov = patches.T @ patches / len(patches)
    lam, vec = torch.linalg.eigh(cov)
    filt = (vec / (lam + 5e-4).sqrt()).T.reshape(27,3,3,3).flip(0)
    with torch.no_grad():
        both = torch.cat([filt, -filt])
        w[:54] = both * (w.norm() / both.norm() * (54/64)**.5)

if a.whiten: whiten_stem()

def train_client(c, round_number, momentum, last_delta, plan):
    gen = generator_for(config.seed, "train", round_number, c)
    rows = rows_of[c][0]
    aug = replace(views, output_size=schedule.train_resolution(round_number))
    opts = build_optimizers(method, settings.optimizer, backend.dtype)
    ids = {id(v): k for k, v in params.items()}
    if momentum:
        for o in opts:
            for g in o.param_groups:
                for w in g["params"]:
                    k = ids[id(w)]
                    if k in momentum:
                        key = "velocity" if o.__class__.__name__ == "Muon" else "momentum_buffer"
                        o.state[w][key] = momentum[k].clone()
    steps = settings.steps(len(rows), plan.fraction)
    bs = min(settings.batch_size, len(rows))
    method.train(); tot = 0.
    if a.fixbn and round_number >= a.fixbn:
        for m in bns.values(): m.eval()
    for s, batch in enumerate(_batches(rows, bs, steps, gen)):
        v = aug.two_views(get_batch(pixels, batch, backend.device), gen)
        with backend.autocast(): loss = method.loss(v) if not (a.synth and gauss) else synth_loss(v, c, gen)
        method.zero_grad(set_to_none=True); loss.total.backward(); tot += float(loss.reported)
        f = cosine(plan.progress(s/steps)) * bs/settings.batch_size
        if a.warm: f *= min(1, ((round_number-1)*steps + s + 1)/a.warm)
        for o in opts:
            (g,) = o.param_groups; g["lr"] = o.defaults["lr"]*f*(1-a.align if last_delta else 1); o.step()
        if last_delta:
            with torch.no_grad():
                for k, w in params.items(): w.add_(last_delta[k], alpha=a.align/steps)
    mom = {}
    for o in opts:
        for w, st in o.state.items():
            t = st.get("velocity", st.get("momentum_buffer"))
            if t is not None: mom[ids[id(w)]] = t
    return clone(), mom, tot/steps

gauss = {}
from model import nt_xent
from fedssl.methods.base import Losses
def synth_loss(v, c, gen):
    z, *deep = method.project(v)
    others = [k for k in gauss if k != c]
    count = int(a.synth * len(v))
    negs = torch.cat([gauss[k][0] + torch.randn(count, len(gauss[k][0]), generator=gen) @ gauss[k][1].T for k in others])
    with torch.autocast("cpu", enabled=False):
        unit = torch.nn.functional.normalize(z.float(), dim=1); neg = torch.nn.functional.normalize(negs, dim=1)
        T = method.temperature
        sim = unit @ unit.T / T; sim.fill_diagonal_(-torch.inf)
        sim = torch.cat([sim, unit @ neg.T / T], 1)
        rows = len(unit); partner = torch.arange(rows).roll(rows//2)
        loss = torch.nn.functional.cross_entropy(sim, partner)
    total = loss
    if deep: total = loss + torch.stack([nt_xent(q, T) for q in deep]).mean()
    return Losses(total, loss.detach(), z.detach())

@torch.no_grad()
def gaussians(round_number):
    method.eval()
    aug = replace(views, output_size=schedule.train_resolution(round_number))
    for c in who_all:
        gen = generator_for(config.seed, "gauss", round_number, c); out = []
        rows = rows_of[c][0][:1024]
        for r in np.array_split(rows, max(1, len(rows)//128)):
            with backend.autocast(): out.append(method.project(aug.two_views(get_batch(pixels, r, backend.device), gen))[0].float())
        z = torch.cat(out); cov = torch.cov(z.T) + 1e-4*torch.eye(z.shape[1])*z.var(0).mean()
        gauss[c] = (z.mean(0), torch.linalg.cholesky(cov))

@torch.no_grad()
def recalibrate(round_number, batches, whole=False):
    """mean and second moments over clients"""
    sums = {k: [0., 0., 0.] for k in bns}
    old = {k: m.momentum for k, m in bns.items()}
    method.train()
    stats = {}
    hooks = []
    def hook(name):
        def f(mod, inp):
            x = inp[0].float(); dims = [d for d in range(x.dim()) if d != 1]
            cnt = x.numel()/x.shape[1]
            s = sums[name]; s[0] = s[0] + x.mean(dims)*cnt; s[1] = s[1] + x.square().mean(dims)*cnt; s[2] += cnt
        return f
    for k, m in bns.items(): hooks.append(m.register_forward_pre_hook(hook(k)))
    keep = clone()
    for c in who_all:
        gen = generator_for(config.seed, "stat", round_number, c)
        rows = rows_of[c][0]
        bs = min(settings.batch_size, len(rows))
        if whole:
            for i in range(batches):
                r = rows[torch.randperm(len(rows), generator=gen)[:2*bs].numpy()]
                x = get_batch(pixels, r, backend.device).float()/255
                with backend.autocast(): method.encoder(x)
        else:
            aug = replace(views, output_size=schedule.train_resolution(round_number))
            for batch in _batches(rows, bs, batches, gen):
                with backend.autocast(): method.loss(aug.two_views(get_batch(pixels, batch, backend.device), gen))
    for h in hooks: h.remove()
    load_state(method, keep)
    for k, m in bns.items():
        s = sums[k]
        if s[2]:
            m.running_mean.copy_(s[0]/s[2]); m.running_var.copy_(s[1]/s[2] - (s[0]/s[2])**2)

@torch.no_grad()
def eval_loss(round_number):
    method.eval(); tot = []; proj = []
    aug = replace(views, output_size=schedule.train_resolution(round_number))
    for c in who_all:
        rows = rows_of[c][1][:256]; gen = generator_for(config.seed, "evaluate", c)
        with backend.autocast(): l = method.loss(aug.two_views(get_batch(pixels, rows[:settings.batch_size], backend.device), gen))
        tot.append(float(l.reported)); proj.append(measure_representation(l.projections))
    return np.mean(tot), {k: round(float(np.mean([q[k] for q in proj])),2) for k in proj[0]}

ev = instantiate(plain(config.eval))
def converged(x, y, tx, ty, k):
    from sklearn.model_selection import StratifiedKFold
    sc = StandardScaler().fit(x); x = torch.from_numpy(sc.transform(x)).float(); tx = torch.from_numpy(sc.transform(tx)).float(); y = torch.from_numpy(y)
    def fit(xx, yy, lam, w=None):
        w = torch.zeros(k, xx.shape[1]+1) if w is None else w.clone()
        w.requires_grad_(True)
        o = torch.optim.LBFGS([w], max_iter=200, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-5)
        def cl():
            o.zero_grad(); l = torch.nn.functional.cross_entropy(xx@w[:, :-1].T + w[:, -1], yy) + lam/2*w[:, :-1].square().sum(); l.backward(); return l
        o.step(cl); return w.detach()
    pred = lambda w, xx: (xx@w[:, :-1].T + w[:, -1]).argmax(1)
    lams = [1., .3, .1, .03, .01, .003, .001]
    acc = np.zeros(len(lams))
    for tr, va in StratifiedKFold(5, shuffle=True, random_state=0).split(x, y):
        w = None
        for i, lam in enumerate(lams):
            w = fit(x[tr], y[tr], lam, w); acc[i] += float((pred(w, x[va]) == y[va]).float().mean())
    best = lams[int(acc.argmax())]
    return 100*float((pred(fit(x, y, best), tx).numpy() == ty).mean()), best

def score(tag):
    side = schedule.eval_resolution(config.num_rounds)
    used = np.unique(np.concatenate([*labelled, held]))
    f = extract_features(method.encoder, pixels[used], backend, 256, side)
    asked, ans = f[np.searchsorted(used, held)], images.labels[held]
    k = int(images.labels.max())+1; H=[];C=[];K=[];L=[]
    for d, rows in enumerate(labelled):
        known, lab = f[np.searchsorted(used, rows)], images.labels[rows]
        H.append(100*float((train_linear_head(known, lab, k, ev, d)(asked) == ans).mean()))
        K.append(100*knn_accuracy(known, lab, asked, ans, 10))
        c, lam = converged(known, lab, asked, ans, k); C.append(c); L.append(lam)
    return {"head": round(np.mean(H),1), "conv": round(np.mean(C),1), "knn": round(np.mean(K),1), "lam": L[0]}

began = time.time()
momentum, local_m, velocity, last_delta = {}, {}, {}, None
turns = [int(t) for t in a.turns.split(",")] if a.turns else []
log = []; prev_global=None
for r in range(1, config.num_rounds+1):
    start = clone()
    plan = schedule.plan(r)
    who = who_all
    share = config.strategy.get("fraction_train", 1.0)
    if turns:
        k = turns[(r-1)*len(turns)//config.num_rounds]
        if k < len(who_all):
            base = ((r-1)*k) % len(who_all); who = [who_all[(base+i) % len(who_all)] for i in range(k)]
    elif share < 1:
        who = sorted(np.random.default_rng([config.seed, r]).choice(who_all, max(1, round(share*len(who_all))), replace=False).tolist())
    states, moms, losses = [], [], []
    for c in who:
        load_state(method, start)
        m = momentum if a.momentum == "averaged" else local_m.get(c, {}) if a.momentum == "local" else {}
        s, mo, l = train_client(c, r, m, last_delta if a.align else None, plan)
        states.append(s); moms.append(mo); losses.append(l); local_m[c] = {k: v.clone() for k, v in mo.items()}
    new = {k: (torch.stack([s[k].float() for s in states]).mean(0).to(v.dtype)) for k, v in start.items()}
    deltas = [{k: s[k]-start[k] for k in params} for s in states]
    if a.momentum == "averaged": momentum = {k: torch.stack([m[k] for m in moms]).mean(0) for k in moms[0]}
    mean = {k: new[k]-start[k] for k in params}
    sq = np.mean([sum(float(d[k].square().sum()) for k in params) for d in deltas]); msq = sum(float(v.square().sum()) for v in mean.values())
    rate = a.rate
    if a.fedexp: rate = max(1, sq/(2*msq))
    step = {}
    for k in params:
        velocity[k] = a.outer*velocity.get(k, 0) + mean[k]
        step[k] = mean[k] + a.outer*velocity[k] if a.nesterov else velocity[k]
        new[k] = start[k] + rate*step[k]
    last_delta = {k: new[k]-start[k] for k in params}
    prev_global = start
    load_state(method, new)
    e0 = eval_loss(r) if r in (1,2,config.num_rounds//2) else None
    if a.each: recalibrate(r, a.recal)
    if a.synth and r >= max(1, a.fixbn - 1): gaussians(r)
    e1 = None
    if r in (1,2,config.num_rounds//2) and a.recal and not a.each:
        keep = clone(); recalibrate(r, a.recal); e1 = eval_loss(r); load_state(method, keep)
    log.append((round(float(np.mean(losses)),3), round((msq/sq)**.5,3)))
    print(r, log[-1], len(who), round(rate,2), e0, e1, f"{time.time()-began:.0f}s", flush=True)
out = {"name": a.name, "args": " ".join(sys.argv[1:]).replace(a.path or "-", "P"), "losses": [l[0] for l in log], "norm": [l[1] for l in log], "train_s": round(time.time()-began), "plain": score("plain")}
if a.last2:
    final = clone(); load_state(method, {k: ((v.float()+prev_global[k].float())/2).to(v.dtype) for k, v in final.items()})
    recalibrate(config.num_rounds, a.recal, whole=True); out["last2"] = score("last2"); load_state(method, final)
if a.recal:
    recalibrate(config.num_rounds, a.recal); out["eval_recal"] = eval_loss(config.num_rounds); out["recal"] = score("recal")
    recalibrate(config.num_rounds, a.recal, whole=True); out["whole"] = score("whole")
print(json.dumps(out)); open("trials.jsonl", "a").write(json.dumps(out)+"\n")
