package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	impsync "github.com/imps-node/imps/pkg/sync"
)

const (
	// rescueInterval is the shortest time between two evictions of Pods of one controller, rescuePause between any two.
	rescueInterval = 10 * time.Minute
	rescuePause    = 200 * time.Millisecond
	// stuckMax is how many stuck Pods a node may name: more than a node has.
	stuckMax = 500
)

// Reasons of Events about Pods and their controllers.
const (
	eventRescuing = "RescuingPod"
	eventRescued  = "Rescued"
	eventWaits    = "RescueWaits"
)

var (
	// errNotYet asks for another look later: the Pod's replacement would be no better off now.
	errNotYet = errors.New("a replacement of the Pod would not pull yet")
	// errBudget likewise: a disruption budget holds the Pod.
	errBudget = errors.New("a disruption budget holds the Pod")
)

// stuckPod is a Pod that the report of a node calls stuck.
type stuckPod struct {
	node string
	impsync.StuckPod
}

func (p stuckPod) String() string { return p.Namespace + "/" + p.Name }

// stuckChanged takes over which Pods of a node are stuck. The caller holds the lock.
func (t *term) stuckChanged(node string, current []impsync.StuckPod) {
	if !t.config.AllowRescue {
		return
	}
	was := t.stuck[node]
	for _, pod := range current {
		if !slices.Contains(was, pod) {
			t.rescueQueue.Add(stuckPod{node, pod})
		}
	}
	if t.stuck[node] = current; len(current) == 0 {
		delete(t.stuck, node)
	}
}

// rescue evicts a Pod that waits in vain for an image, if it was admitted before its ServiceAccount named the Secret that has
// credentials for it, and its replacement will name that Secret. What a report says is not believed, but looked at.
func (t *term) rescue(ctx context.Context, stuck stuckPod) error {
	t.mu.Lock()
	reported := slices.Contains(t.stuck[stuck.node], stuck.StuckPod)
	delivered := t.deliveredIn(stuck.Namespace)
	t.mu.Unlock()
	if !reported {
		return nil
	}
	if !slices.ContainsFunc(delivered, func(r impsync.Rendered) bool { return r.Rescue }) {
		return errNotYet
	}
	asking, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	pod, err := t.core.Pods(stuck.Namespace).Get(asking, stuck.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read Pod %s: %w", stuck, err)
	}
	owner := replacer(pod)
	if pod.UID != stuck.UID || pod.Spec.NodeName != stuck.node || owner == nil {
		return nil // another one, one of another node, or one that nobody would make anew
	}
	account, err := t.core.ServiceAccounts(stuck.Namespace).Get(asking, pod.Spec.ServiceAccountName, metav1.GetOptions{})
	if err != nil {
		return passing("read ServiceAccount "+stuck.Namespace+"/"+pod.Spec.ServiceAccountName, err)
	}
	switch helps, secret := replacementHelps(pod, account, delivered); helps {
	case never:
		return nil
	case notYet:
		return errNotYet
	default:
		return t.evict(ctx, stuck, pod, *owner, secret)
	}
}

// deliveredIn returns what is in a namespace as it should be. The caller holds the lock.
func (t *term) deliveredIn(namespace string) (all []impsync.Rendered) {
	for uid, c := range t.claims {
		o := c.outcomes[namespace]
		if t.inForce(uid) && o.kind == delivered && o.counter == c.rendered.Target.Revision().Counter && !c.rendered.Target.IsZero() {
			all = append(all, c.rendered)
		}
	}
	return all
}

// replacer is the controller that replaces a Pod that is gone; nil where there is none: a static Pod's is its Node.
func replacer(pod *corev1.Pod) *metav1.OwnerReference {
	owner := metav1.GetControllerOf(pod)
	if owner == nil || owner.Kind == "Node" || pod.Annotations[corev1.MirrorPodAnnotationKey] != "" {
		return nil
	}
	return owner
}

// helps says whether the replacement of a stuck Pod would be better off.
type helps uint8

const (
	// never: it would not, whatever comes.
	never helps = iota
	// notYet: it would not as things stand.
	notYet
	atOnce
)

// replacementHelps reports whether the replacement of a Pod would pull what it cannot: it copies what the ServiceAccount names
// at its admission, if the Pod has nothing of its own. secret is what it would name for that.
func replacementHelps(pod *corev1.Pod, account *corev1.ServiceAccount, delivered []impsync.Rendered) (_ helps, secret string) {
	has, gets := impsync.PullSecrets(pod.Spec.ImagePullSecrets), impsync.PullSecrets(account.ImagePullSecrets)
	failed := impsync.FailedPulls(pod)
	if len(failed) == 0 {
		return notYet, "" // by the time of the next report it is out of it
	}
	if impsync.HasOwnPullSecrets(pod, account) {
		return never, "" // somebody else than the ServiceAccount says what it names
	}
	var missed []string
	for _, pull := range failed {
		found, heals, misses := false, false, []string(nil)
		for _, r := range delivered {
			name := r.Target.Name()
			if credentials, err := r.Target.Credentials(); err != nil || !slices.Contains(gets, name) || !credentials.Serves(pull.Image) {
				continue
			}
			found = true
			if slices.Contains(has, name) {
				heals = true // the kubelet tries again with it
			} else if r.Rescue {
				misses = append(misses, name)
			}
		}
		if !found {
			return notYet, ""
		}
		if !heals {
			missed = append(missed, misses...)
		}
	}
	switch {
	case len(missed) == 0:
		return notYet, ""
	case !impsync.CameTooEarly(pod, account):
		return never, "" // it came after, and does not name it all the same
	}
	return atOnce, slices.Min(missed)
}

// evict has a Pod evicted for the sake of a Secret that its replacement will name, unless a budget holds it, or another Pod of
// its controller was evicted a moment ago.
func (t *term) evict(ctx context.Context, stuck stuckPod, pod *corev1.Pod, owner metav1.OwnerReference, secret string) error {
	asking, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	switch budget, err := t.heldBy(asking, pod); {
	case err != nil:
		return err
	case budget != "":
		t.recorder.Eventf(pod, corev1.EventTypeNormal, eventWaits, "The Pod could pull if it were made anew, as its ServiceAccount names Secret %s by now, and PodDisruptionBudget %s allows no eviction", secret, budget)
		return errBudget
	}
	wait, err := t.takeTurn(asking, pod, owner, secret)
	if err != nil {
		return err
	}
	if wait > 0 {
		t.rescueQueue.AddAfter(stuck, wait)
		return nil
	}
	err = t.core.Pods(pod.Namespace).EvictV1(asking, &policyv1.Eviction{
		ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name},
		// Only as it was judged: it may pull just now.
		DeleteOptions: &metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &pod.UID, ResourceVersion: &pod.ResourceVersion}},
	})
	t.metrics.rescues.WithLabelValues(impsync.ResultOf(err)).Inc()
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case apierrors.HasStatusCause(err, policyv1.DisruptionBudgetCause):
		return errBudget // its state has changed meanwhile
	case err != nil:
		return fmt.Errorf("evict Pod %s: %w", stuck, err)
	}
	t.log.Info("evicted a Pod that could not pull", "namespace", pod.Namespace, "pod", pod.Name, "controller", owner.Kind+"/"+owner.Name, "secret", secret)
	t.recorder.Eventf(pod, corev1.EventTypeNormal, eventRescued, "Evicted: it was admitted before its ServiceAccount named Secret %s, and could not pull; its replacement will", secret)
	impsync.Pause(ctx, rescuePause)
	return nil
}

// heldBy returns the name of a disruption budget that allows no eviction of a Pod, empty where there is none.
//
// The API server asks no budget about a Pod that is Pending (canIgnorePDB in pkg/registry/core/pod/storage/eviction.go), as
// most are that cannot pull. So one is asked here whether it allows any disruption at all, when all its Pods are well; how
// many at present, the API server knows best.
func (t *term) heldBy(ctx context.Context, pod *corev1.Pod) (string, error) {
	budgets, err := t.budgets.PodDisruptionBudgets(pod.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", fmt.Errorf("list the PodDisruptionBudgets of %s: %w", pod.Namespace, err)
	}
	for i := range budgets.Items {
		budget := &budgets.Items[i]
		selector, err := metav1.LabelSelectorAsSelector(budget.Spec.Selector)
		if err != nil || !selector.Matches(labels.Set(pod.Labels)) {
			continue // as the API server does
		}
		policy, status := budget.Spec.UnhealthyPodEvictionPolicy, budget.Status
		if policy != nil && *policy == policyv1.AlwaysAllow {
			continue
		}
		if status.ObservedGeneration < budget.Generation || status.ExpectedPods <= status.DesiredHealthy {
			return budget.Name, nil
		}
	}
	return "", nil
}

// takeTurn returns for how long a Pod has to wait, as another one of its controller was evicted a moment ago, or is about to
// be. If it need not, an Event on the controller says that it is this one's turn: the next leader goes by that, too.
func (t *term) takeTurn(ctx context.Context, pod *corev1.Pod, owner metav1.OwnerReference, secret string) (time.Duration, error) {
	events := t.core.Events(pod.Namespace)
	name := "imps-rescue-" + string(owner.UID)
	last, err := events.Get(ctx, name, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return 0, fmt.Errorf("read Event %s/%s: %w", pod.Namespace, name, err)
	}
	count, first := int32(1), metav1.Now()
	if err == nil {
		wait := rescueInterval - time.Since(last.LastTimestamp.Time)
		if mine := last.Related != nil && last.Related.UID == pod.UID; wait > 0 && !mine {
			return wait, nil
		}
		count, first = last.Count+1, last.FirstTimestamp
	}
	body, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Event",
		"metadata": map[string]any{"name": name, "resourceVersion": last.ResourceVersion},
		"involvedObject": corev1.ObjectReference{
			APIVersion: owner.APIVersion, Kind: owner.Kind, Namespace: pod.Namespace, Name: owner.Name, UID: owner.UID,
		},
		"related": corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
		"reason":  eventRescuing, "type": corev1.EventTypeNormal, "source": corev1.EventSource{Component: impsync.FieldManager},
		"message":        fmt.Sprintf("Evicting Pod %s: it was admitted before its ServiceAccount named Secret %s, and cannot pull; its replacement will", pod.Name, secret),
		"firstTimestamp": first, "lastTimestamp": metav1.Now(), "count": count,
	})
	if err != nil {
		return 0, fmt.Errorf("encode an Event: %w", err)
	}
	force := true
	_, err = events.Patch(ctx, name, types.ApplyPatchType, body, metav1.PatchOptions{FieldManager: impsync.FieldManager, Force: &force})
	if err != nil {
		return 0, fmt.Errorf("write Event %s/%s: %w", pod.Namespace, name, err)
	}
	return 0, nil
}

// rescueRefused says that a resource asks for what this installation does not allow, empty where it does not.
func (c *Coordinator) rescueRefused(asked bool) string {
	if !asked || c.config.AllowRescue {
		return ""
	}
	return "spec.target.rescue is set, and --allow-rescue is not, so that no Pod is evicted: the chart's value allowRescue sets it, and gives the rights"
}
