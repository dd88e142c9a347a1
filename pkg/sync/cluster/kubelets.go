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

// nodeCount is how many nodes there are, and what becomes of the credentials on them.
type nodeCount struct {
	all int
	// withoutAgent have no report that can be read: such a one says nothing, also about what the Pods demand.
	withoutAgent int
	// serving have their node cache up to date, withoutCache have none, and failing cannot write it: "<node>: <why>", sorted.
	serving, withoutCache int
	failing               []string
}

// countNodes counts the nodes, or returns what was counted since the last change. The caller holds the lock.
func (t *term) countNodes() *nodeCount {
	if t.counted != nil {
		return t.counted
	}
	n := &nodeCount{}
	t.nodes.Range(func(key types.NamespacedName, _ struct{}) bool {
		n.all++
		r, ok := t.reports.Get(types.NamespacedName{Namespace: t.config.Namespace, Name: impsync.ReportName(key.Name)})
		switch {
		case !ok || r.err != nil:
			n.withoutAgent++
		case r.kubelet == nil:
			n.withoutCache++
		case r.kubelet.Problem != "":
			n.failing = append(n.failing, key.Name+": "+r.kubelet.Problem)
		default:
			n.serving++
		}
		return true
	})
	slices.Sort(n.failing)
	t.counted = n
	return n
}

// kubeletReady says on how many nodes the credentials are where the kubelet's provider finds them, and why not on the others. Nodes
// without an agent are counted, and no failure: some kinds of nodes never have one. An agent that is away counts by what it has said
// last: what it has written is served meanwhile. Without a type where the resource does not ask for kubelets.
func (t *term) kubeletReady(r *v1alpha1.ImagePullSecret) metav1.Condition {
	if r.Spec.Target.Kubelet == nil {
		return metav1.Condition{}
	}
	n := t.countNodes()
	condition := metav1.Condition{Type: v1alpha1.ConditionKubeletReady, Status: metav1.ConditionTrue, Reason: reasonReady}
	condition.Message = fmt.Sprintf("%d of %d nodes have said that their node cache is up to date", n.serving, n.all)
	switch {
	case len(n.failing) > 0, n.all > 0 && n.withoutAgent == n.all:
		condition.Status, condition.Reason = metav1.ConditionFalse, reasonFailed
	case n.withoutCache > 0 && n.serving == 0:
		condition.Status, condition.Reason = metav1.ConditionFalse, reasonNotAllowed
	case n.withoutCache > 0: // it is being rolled out
		condition.Status, condition.Reason = metav1.ConditionUnknown, reasonProgressing
	}
	if len(n.failing) > 0 {
		condition.Message += notOf + listed(n.failing)
	}
	if n.withoutCache > 0 {
		condition.Message += fmt.Sprintf("; the agents of %d run without --node-cache-dir, which the chart's value nodeCache.enabled sets", n.withoutCache)
	}
	if n.withoutAgent > 0 {
		condition.Message += fmt.Sprintf("; %d have no agent", n.withoutAgent)
	}
	return condition
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
