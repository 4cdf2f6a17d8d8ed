import os, sys, signal, torch, lightning as L, hashlib
import torch.distributed as dist
sys.argv=[sys.argv[0],"--out","x"]
sys.path.insert(0,"/work/main/tests/jobs")
import train, lightning_flashrl
where=os.environ.get("WHERE",""); rank=int(os.environ.get("RANK",0)); inc=int(os.environ.get("FLASHRL_INCARNATION",0))
class T(train.Model):
    def setup(self, stage):
        self.groups=[dist.new_group([0,1]), dist.new_group([2,3])]
        if where=="setup" and rank==1 and inc==0: os.kill(os.getpid(),9)
        t=torch.ones(1)*rank; dist.all_reduce(t, group=self.groups[rank//2]); self.pair=t.item()
        self.all=dist.new_group([0,1,2,3])
        o=[None]*4; dist.all_gather_object(o,(rank,self.pair),group=self.all); self.o=o
    def training_step(self,b,i):
        if where=="fit" and rank==1 and inc==0 and self.global_step==3: os.kill(os.getpid(),9)
        l=super().training_step(b,i)
        t=l["loss"].detach().clone(); dist.all_reduce(t, group=self.groups[rank//2]); self.log("pair_loss", t)
        dist.all_reduce(t, group=self.all)
        if where=="fit2" and rank==2 and inc==0 and self.global_step==3: os.kill(os.getpid(),9)
        self.tot=getattr(self,"tot",0)+t.item()
        return l
L.seed_everything(1,verbose=False)
tr=L.Trainer(strategy="flash_ddp",devices=4,accelerator="cpu",logger=False,enable_progress_bar=False,enable_model_summary=False,enable_checkpointing=False,max_epochs=1)
m=T(); tr.fit(m)
print(rank,"RESULT",hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in m.parameters())).hexdigest()[:8], m.tot, m.pair, m.o,flush=True)
dist.destroy_process_group()
