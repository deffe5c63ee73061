import os
def run():
    import torch.distributed as dist
    from tests.dist import engine_cases as E
    from mlm_dist import distributed
    calls=[]
    real=dist.new_group
    def ng(*a,**k):
        calls.append((a,k.get("backend"))); return real(*a,**k)
    dist.new_group=ng
    import torch.distributed.distributed_c10d as c
    def s():
        n=0
        for f in os.listdir("/proc/self/fd"):
            try: n+= os.readlink(f"/proc/self/fd/{f}").startswith("socket:")
            except OSError: pass
        return n
    out=[("start",s())]
    distributed.init(60); out.append(("init",s(),len(calls)))
    ctl=distributed.ControlGroup(60); out.append(("control",s(),len(calls)))
    for t in ("zero0","zero2","zero3"):
        e=E.make_engine(t); E.run_steps(e,ctl,0,2); out.append((t,s(),len(calls),len(c._world.pg_map)))
        a=[]
    out.append([str(x) for x in calls])
    return out
