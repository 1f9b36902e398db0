import math, json, pytest
from test_rollouts import *  # noqa
CASES = {
 "iq_inf": {"name":"iq_learn","alpha":math.inf},
 "sqil": {"name":"sqil"},
 "sqil_99": {"name":"sqil","gamma":0.99},
 "sqil_slow": {"name":"sqil","target":"slow"},
 "sqil_raw": {"name":"sqil","coordinates":"raw"},
 "ls_iq": {"name":"ls_iq"},
 "ls_iq_99": {"name":"ls_iq","gamma":0.99},
 "ls_iq_fixed": {"name":"ls_iq","teacher_target":"fixed"},
 "ls_iq_zero": {"name":"ls_iq","absorbing":"zero"},
 "ls_iq_g5": {"name":"ls_iq","gamma":0.5,"r_max":1.0},
 "tq": {"name":"teacher_q"},
 "tq_res": {"name":"teacher_q","target":"residual"},
 "tq_res_g0": {"name":"teacher_q","target":"residual","gamma":0.0},
 "tq_lam": {"name":"teacher_q","lam":0.8},
 "tq_5": {"name":"teacher_q","steps":5},
 "tq_raw_logits": {"name":"teacher_q","coordinates":"raw","teacher_level":"logits"},
 "authors": {"name":"bellman_distill_authors"},
}
@pytest.mark.parametrize("case", CASES)
def test_scratch(case, train, rollouts):
    name=CASES[case]["name"]
    r = rollouts(every=10) if name in ("sqil","ls_iq") else None
    t = train(rollouts=r, objective=CASES[case], max_steps=60, off_support="none" if name.startswith("bell") else "tail", learning_rate=2e-3)
    ev = t.evaluate()
    logs=[h for h in t.state.log_history if "loss" in h]
    f,l=logs[0],logs[-1]
    print("\nRES",case,{k:round(v,3) for k,v in ev.items() if k in("eval_kl_set_tail","eval_nll","eval_agreement_top1")},"loss",round(f["loss"],3),"->",round(l["loss"],3),"gn",round(f["grad_norm"],2),round(l["grad_norm"],2),{k:round(l[k],3) for k in l if k in("value","recovered_reward","td_error_squared","clipped_share","first_term","largest_outside_share")})
