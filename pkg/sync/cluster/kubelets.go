package cluster

import (
	"fmt"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// kubelets says what becomes of the credentials on the nodes that are there.
type kubelets struct {
	nodes, serving, withoutAgent, withoutCache int
	// failing are the nodes whose agent cannot write its cache, "<node>: <why>", sorted.
	failing []string
}

// kubelets counts the nodes, or returns what it has counted since the last change. The caller holds the lock.
func (t *term) kubelets() *kubelets {
	if t.counted != nil {
		return t.counted
	}
	k := &kubelets{}
	t.nodes.Range(func(key types.NamespacedName, _ struct{}) bool {
		k.nodes++
		r, ok := t.reports.Get(types.NamespacedName{Namespace: t.config.Namespace, Name: impsync.ReportName(key.Name)})
		switch {
		case !ok || r.err != nil:
			k.withoutAgent++
		case r.kubelet == nil:
			k.withoutCache++
		case r.kubelet.Problem != "":
			k.failing = append(k.failing, key.Name+": "+r.kubelet.Problem)
		default:
			k.serving++
		}
		return true
	})
	slices.Sort(k.failing)
	t.counted = k
	return k
}

// kubeletReady says on how many nodes the credentials are where the kubelet's provider finds them, and why not on the others. Nodes
// without an agent are counted, and no failure: some kinds of nodes never have one. An agent that is away counts by what it has said
// last: what it has written is served meanwhile.
func (t *term) kubeletReady(r *v1alpha1.ImagePullSecret) []metav1.Condition {
	if r.Spec.Target.Kubelet == nil {
		return nil
	}
	k := t.kubelets()
	condition := metav1.Condition{Type: v1alpha1.ConditionKubeletReady, Status: metav1.ConditionTrue, Reason: reasonReady}
	condition.Message = fmt.Sprintf("%d of %d nodes have said that their node cache is up to date", k.serving, k.nodes)
	switch {
	case len(k.failing) > 0, k.nodes > 0 && k.withoutAgent == k.nodes:
		condition.Status, condition.Reason = metav1.ConditionFalse, reasonFailed
	case k.withoutCache > 0 && k.serving == 0:
		condition.Status, condition.Reason = metav1.ConditionFalse, reasonNotAllowed
	case k.withoutCache > 0: // it is being rolled out
		condition.Status, condition.Reason = metav1.ConditionUnknown, reasonProgressing
	}
	if len(k.failing) > 0 {
		condition.Message += notOf + listed(k.failing)
	}
	if k.withoutCache > 0 {
		condition.Message += fmt.Sprintf("; the agents of %d run without --node-cache-dir, which the chart's value nodeCache.enabled sets", k.withoutCache)
	}
	if k.withoutAgent > 0 {
		condition.Message += fmt.Sprintf("; %d have no agent", k.withoutAgent)
	}
	return []metav1.Condition{condition}
}

// kubeletsDelay is how long a change of the nodes waits for others: where nodes come and go all the time, that many writes.
const kubeletsDelay = 5 * time.Second

// kubeletsChanged has the status of the resources written that kubelets are served. The caller holds the lock.
func (t *term) kubeletsChanged() {
	t.counted = nil
	for uid := range t.claims {
		if r := t.byUID[uid]; r != nil && r.Spec.Target.Kubelet != nil {
			t.statusQueue.AddAfter(uid, kubeletsDelay)
		}
	}
}
