package cluster

import (
	"cmp"
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
	// admissionLag is for how long an API server may admit a Pod by what a ServiceAccount named before: it goes by a watch.
	admissionLag = 5 * time.Second
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
	pod, template, account, err := t.readStuck(ctx, stuck)
	if err != nil {
		return err
	}
	if pod == nil {
		return nil
	}
	if template == nil || len(template.ImagePullSecrets) > 0 || !impsync.CameTooEarly(pod, account) {
		// Nobody would make it anew, or it would name what it names now, or would not have come too early.
		t.rescueQueue.AddAfter(stuck, impsync.RecheckInterval)
		return nil
	}
	if wait := min(admissionLag-time.Since(impsync.AttachedAt(account)), admissionLag); wait > 0 {
		t.rescueQueue.AddAfter(stuck, wait)
		return nil
	}
	secret := wouldName(pod, account, delivered)
	if secret == "" {
		return errNotYet
	}
	return t.evict(ctx, stuck, pod, secret)
}

// readStuck reads a Pod, what it would be made from anew, and the ServiceAccount that it would have then. The Pod is nil where
// it is another one by now, or on another node than that whose report calls it stuck.
func (t *term) readStuck(ctx context.Context, stuck stuckPod) (pod *corev1.Pod, template *corev1.PodSpec, account *corev1.ServiceAccount, err error) {
	ctx, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	pod, err = t.core.Pods(stuck.Namespace).Get(ctx, stuck.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil, nil, nil
	case err != nil:
		return nil, nil, nil, fmt.Errorf("read Pod %s: %w", stuck, err)
	case pod.UID != stuck.UID || pod.Spec.NodeName != stuck.node:
		return nil, nil, nil, nil
	}
	if template, err = impsync.TemplateOf(ctx, t.core.RESTClient(), pod); template == nil || err != nil {
		return pod, nil, nil, err
	}
	name := cmp.Or(template.ServiceAccountName, "default")
	if account, err = t.core.ServiceAccounts(stuck.Namespace).Get(ctx, name, metav1.GetOptions{}); err != nil {
		err = passing("read ServiceAccount "+stuck.Namespace+"/"+name, err)
	}
	return pod, template, account, err
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

// wouldName returns a Secret that a Pod lacks for what it cannot pull, and that its ServiceAccount names by now. It is empty
// where there is none, where something would still be missing, and where the Pod names all that it needs: then the kubelet
// finds it at its next try.
func wouldName(pod *corev1.Pod, account *corev1.ServiceAccount, delivered []impsync.Rendered) (secret string) {
	has, gets := impsync.PullSecrets(pod.Spec.ImagePullSecrets), impsync.PullSecrets(account.ImagePullSecrets)
	for _, image := range impsync.RefusedImages(pod) {
		found, heals, missed := false, false, ""
		for _, r := range delivered {
			name := r.Target.Name()
			if credentials, err := r.Target.Credentials(); err != nil || !slices.Contains(gets, name) || !credentials.Serves(image) {
				continue
			}
			found = true
			if slices.Contains(has, name) {
				heals = true
			} else if r.Rescue {
				missed = name
			}
		}
		if !found {
			return ""
		}
		if !heals {
			secret = cmp.Or(missed, secret)
		}
	}
	return secret
}

// evict has a Pod evicted for the sake of a Secret that its replacement will name, unless a budget holds it, or another Pod of
// its controller was evicted a moment ago.
func (t *term) evict(ctx context.Context, stuck stuckPod, pod *corev1.Pod, secret string) error {
	asking, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	owner := metav1.GetControllerOf(pod)
	last, err := t.lastTurn(asking, pod, owner)
	if err != nil {
		return err
	}
	if wait := waitFor(last, pod, time.Now()); wait > 0 {
		t.rescueQueue.AddAfter(stuck, wait)
		return nil
	}
	held, err := t.heldBy(asking, pod)
	if err != nil {
		return err
	}
	eviction := policyv1.Eviction{
		ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name},
		// Only as it was judged: it may pull just now.
		DeleteOptions: &metav1.DeleteOptions{
			Preconditions: &metav1.Preconditions{UID: &pod.UID, ResourceVersion: &pod.ResourceVersion}, DryRun: []string{metav1.DryRunAll},
		},
	}
	if held == "" { // does the API server, and whatever it asks, agree?
		if err = t.core.Pods(pod.Namespace).EvictV1(asking, &eviction); apierrors.HasStatusCause(err, policyv1.DisruptionBudgetCause) {
			held = impsync.Explain(err)
		}
	}
	switch {
	case held != "":
		t.recorder.Eventf(pod, corev1.EventTypeNormal, eventWaits, "The Pod could pull if it were made anew, as its ServiceAccount names Secret %s by now, and is not evicted: %s", secret, held)
		return errBudget
	case apierrors.IsNotFound(err):
		return nil
	case err != nil:
		return fmt.Errorf("evict Pod %s: %w", stuck, err)
	}
	if err := t.takeTurn(asking, last, pod, owner, secret); err != nil {
		return err
	}
	eviction.DeleteOptions.DryRun = nil
	err = t.core.Pods(pod.Namespace).EvictV1(asking, &eviction)
	t.metrics.rescues.WithLabelValues(impsync.ResultOf(err)).Inc()
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("evict Pod %s: %w", stuck, err)
	}
	t.log.Info("evicted a Pod that could not pull", "namespace", pod.Namespace, "pod", pod.Name, "controller", owner.Kind+"/"+owner.Name, "secret", secret)
	t.recorder.Eventf(pod, corev1.EventTypeNormal, eventRescued, "Evicted: it was admitted before its ServiceAccount named Secret %s, and could not pull; its replacement will", secret)
	impsync.Pause(ctx, rescuePause)
	return nil
}

// heldBy says which disruption budget allows no eviction of a Pod, empty where none does not.
//
// The API server asks no budget about a Pod that is Pending (canIgnorePDB in pkg/registry/core/pod/storage/eviction.go), as one
// is of which any container never ran. So one is asked here: whether it allows any disruption at all, when all its Pods are
// well; and about a Pod of which some container runs, what the API server would ask about one that is not Pending.
func (t *term) heldBy(ctx context.Context, pod *corev1.Pod) (string, error) {
	budgets, err := t.budgets.PodDisruptionBudgets(pod.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", fmt.Errorf("list the PodDisruptionBudgets of %s: %w", pod.Namespace, err)
	}
	for i := range budgets.Items {
		if budget := &budgets.Items[i]; holds(budget, pod) {
			return "PodDisruptionBudget " + budget.Name + " allows no eviction", nil
		}
	}
	return "", nil
}

func holds(budget *policyv1.PodDisruptionBudget, pod *corev1.Pod) bool {
	selector, err := metav1.LabelSelectorAsSelector(budget.Spec.Selector)
	if err != nil || !selector.Matches(labels.Set(pod.Labels)) {
		return false // as the API server does
	}
	if policy := budget.Spec.UnhealthyPodEvictionPolicy; policy != nil && *policy == policyv1.AlwaysAllow {
		return false
	}
	runs := slices.ContainsFunc(pod.Status.ContainerStatuses, func(s corev1.ContainerStatus) bool { return s.State.Running != nil })
	status := budget.Status
	healthy := status.DisruptionsAllowed > 0 || status.CurrentHealthy >= status.DesiredHealthy && status.DesiredHealthy > 0
	return status.ObservedGeneration < budget.Generation || status.ExpectedPods <= status.DesiredHealthy || runs && !healthy
}

// turnOf is the name of the Event about a controller that says whose turn it was last. The next leader goes by that, too.
func turnOf(owner *metav1.OwnerReference) string { return "imps-rescue-" + string(owner.UID) }

// lastTurn reads the Event about the last eviction of a Pod of a controller, an empty one where there was none.
func (t *term) lastTurn(ctx context.Context, pod *corev1.Pod, owner *metav1.OwnerReference) (*corev1.Event, error) {
	last, err := t.core.Events(pod.Namespace).Get(ctx, turnOf(owner), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return &corev1.Event{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read Event %s/%s: %w", pod.Namespace, turnOf(owner), err)
	}
	return last, nil
}

// takeTurn says in that Event that it is a Pod's turn.
func (t *term) takeTurn(ctx context.Context, last *corev1.Event, pod *corev1.Pod, owner *metav1.OwnerReference, secret string) error {
	name, now := turnOf(owner), metav1.Now()
	first := last.FirstTimestamp
	if first.IsZero() {
		first = now
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
		"firstTimestamp": first, "lastTimestamp": now, "count": last.Count + 1,
	})
	if err != nil {
		return fmt.Errorf("encode an Event: %w", err)
	}
	force := true
	_, err = t.core.Events(pod.Namespace).Patch(ctx, name, types.ApplyPatchType, body, metav1.PatchOptions{FieldManager: impsync.FieldManager, Force: &force})
	if err != nil {
		return fmt.Errorf("write Event %s/%s: %w", pod.Namespace, name, err)
	}
	return nil
}

// waitFor is for how long a Pod has to wait after the last eviction of a Pod of its controller; zero for not at all.
func waitFor(last *corev1.Event, pod *corev1.Pod, now time.Time) time.Duration {
	if last.Related != nil && last.Related.UID == pod.UID {
		return 0 // it was this one's turn, and still is
	}
	// By the API server's clock, as the Pod's creation.
	var evicted time.Time
	for _, entry := range last.ManagedFields {
		if entry.Manager == impsync.FieldManager && entry.Time != nil {
			evicted = entry.Time.Time
		}
	}
	// Of the same second it may be a replacement, or a sibling; of the second time on it is taken for the former.
	created := pod.CreationTimestamp.Time
	if !evicted.IsZero() && (created.After(evicted) || created.Equal(evicted) && last.Count > 1) {
		return rescueInterval // it came in the place of one, and is no better off: something else is the matter
	}
	return min(rescueInterval-now.Sub(last.LastTimestamp.Time), rescueInterval)
}

// rescueRefused says that a resource asks for what this installation does not allow, empty where it does not.
func (c *Coordinator) rescueRefused(asked bool) string {
	if !asked || c.config.AllowRescue {
		return ""
	}
	return "spec.target.rescue is set, and --allow-rescue is not, so that no Pod is evicted: the chart's value allowRescue sets it, and gives the rights"
}
