package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

const (
	// statusDelay is how long a change waits for company before it is written.
	statusDelay = 50 * time.Millisecond
	// statusInterval is the shortest time between two writes of one status.
	statusInterval = 1500 * time.Millisecond
	// listedMax is how many single causes a message names.
	listedMax = 3
	// messageMax is how many bytes of a message a condition holds.
	messageMax = 4096
)

// Reasons of Events, as banzaicloud/imps names them.
const (
	eventReconciled     = "Reconciled"
	eventSources        = "SourceCredentialsError"
	eventFailed         = "ReconciliationFailed"
	eventSecrets        = "SecretReconciliationError"
	eventSecretDeletion = "SecretDeletionError"
	// Those of imps-node's own.
	eventAccounts = "ServiceAccountError"
	eventKubelet  = "KubeletError"
)

// Reasons of conditions.
const (
	reasonReady        = "Ready"
	reasonProgressing  = "Progressing"
	reasonSourceFailed = "SourceFailed"
	// reasonIdentityChanged: the coordinator is not who it was when it asked ECR for a token.
	reasonIdentityChanged = "IdentityChanged"
	reasonInvalid         = "InvalidSpec"
	reasonNothing         = "NothingToDeliver"
	reasonFailed          = "DeliveryFailed"
	reasonNotAllowed      = "NotAllowed"
)

// statusDirty has the status of a resource looked at soon.
func (t *term) statusDirty(uid types.UID) { t.statusQueue.AddAfter(uid, statusDelay) }

// summary is what the outcomes of a claim add up to.
type summary struct {
	counts      v1alpha1.NamespaceCounts
	managed     []string
	pending     int
	failed      []string // "<namespace>: <message>"
	undeletable []string
}

// summarize adds up the outcomes of a claim. The caller holds the lock.
func (t *term) summarize(c *claim) summary {
	var s summary
	for key, u := range t.undeletable {
		if u.owner == c.ref.UID {
			s.undeletable = append(s.undeletable, key.String()+": "+u.message)
		}
	}
	counter := c.rendered.Target.Revision().Counter
	for namespace, o := range c.outcomes {
		switch o.kind {
		case excluded:
			s.counts.Excluded++
			continue
		case conflicted, foreign, failed:
			s.failed = append(s.failed, namespace+": "+o.message)
		case delivered, pending:
			if o.kind == delivered && o.counter == counter {
				s.counts.Delivered++
			} else {
				s.pending++
			}
		}
		s.counts.Selected++
		if o.counter > 0 {
			s.managed = append(s.managed, namespace)
		}
	}
	slices.Sort(s.managed)
	slices.Sort(s.failed)
	slices.Sort(s.undeletable)
	return s
}

// reconcileStatus writes the status of a resource if it has changed.
func (t *term) reconcileStatus(ctx context.Context, uid types.UID) error {
	t.mu.Lock()
	r, c := t.byUID[uid], t.claims[uid]
	if r == nil || c == nil || c.unread {
		t.mu.Unlock()
		return nil
	}
	if mirror := t.targets[c.rendered.Target.Name()]; mirror != nil && mirror.Err() == nil {
		select {
		case <-mirror.Synced():
		default:
			t.mu.Unlock()
			return nil // nothing is known of its Secrets yet; their first list brings it back
		}
	}
	if c.accounts != nil && t.accounts.Err() == nil && !isClosed(t.accounts.Synced()) {
		t.mu.Unlock()
		return nil // their first list brings it back
	}
	if wait := statusInterval - time.Since(c.statusWritten); wait > 0 {
		t.mu.Unlock()
		t.statusQueue.AddAfter(uid, wait)
		return nil
	}
	s := t.summarize(c)
	status := t.statusOf(r, c, s)
	counter := c.rendered.Target.Revision().Counter
	expires := earliest(c.rendered.Expiries)
	rotated := status.Status == v1alpha1.StatusReady && c.reported != counter && c.reported != 0
	t.exportMetrics(r.Name, s, status) // under the lock: once it has ended, nothing is
	t.mu.Unlock()

	if equality.Semantic.DeepEqual(status, r.Status) && !rotated && expires.IsZero() == (r.Status.ValiditySeconds == 0) {
		t.change(func() { c.markReported(status, counter) })
		return nil
	}
	now := metav1.Now().Rfc3339Copy()
	if status.Status == v1alpha1.StatusReady {
		status.LastSuccessfulReconciliation = &now
	}
	status.ValiditySeconds = validity(expires, t.awsNow())
	t.change(func() { c.statusWritten = time.Now() }) // or tried: that is paced as well
	if err := t.writeStatus(ctx, r, status); err != nil {
		return err
	}
	t.change(func() {
		c.markReported(status, counter)
		if t.byUID[uid] == r { // or the watch has brought a newer one
			written := *r
			written.Status = status
			t.byUID[uid] = &written
		}
	})
	t.emit(r, c, status, s)
	return nil
}

func (c *claim) markReported(status v1alpha1.ImagePullSecretStatus, counter uint64) {
	if status.Status == v1alpha1.StatusReady {
		c.reported = counter
	}
}

// statusOf computes the status from what is known. The caller holds the lock.
func (t *term) statusOf(r *v1alpha1.ImagePullSecret, c *claim, s summary) v1alpha1.ImagePullSecretStatus {
	status := v1alpha1.ImagePullSecretStatus{
		ValiditySeconds:              r.Status.ValiditySeconds, // set anew where anything else has changed
		ObservedGeneration:           c.generation,
		LastSuccessfulReconciliation: r.Status.LastSuccessfulReconciliation,
		SourceSecretStatus:           c.sources,
		ManagedNamespaces:            s.managed[:min(len(s.managed), v1alpha1.ManagedNamespacesMax)],
		Namespaces:                   &s.counts,
	}
	conditions := []metav1.Condition{sourcesReady(c), t.secretsReady(c, s)}
	for _, condition := range []metav1.Condition{t.accountsReady(r, c), t.kubeletReady(r)} {
		if condition.Type != "" {
			conditions = append(conditions, condition)
		}
	}
	conditions = append([]metav1.Condition{ready(conditions)}, conditions...)
	for _, condition := range conditions {
		condition.ObservedGeneration = c.generation
		condition.Message = bounded(condition.Message)
		// Keeps the time of the last transition where there is none.
		if was := meta.FindStatusCondition(r.Status.Conditions, condition.Type); was != nil && was.Status == condition.Status {
			condition.LastTransitionTime = was.LastTransitionTime
		} else {
			condition.LastTransitionTime = metav1.NewTime(time.Now().Truncate(time.Second))
		}
		status.Conditions = append(status.Conditions, condition)
	}
	switch overall := status.Conditions[0]; overall.Status {
	case metav1.ConditionTrue:
		status.Status = v1alpha1.StatusReady
	case metav1.ConditionFalse:
		status.Status, status.Reason = v1alpha1.StatusFailed, overall.Message
	case metav1.ConditionUnknown: // in progress: neither, as before the first status
	}
	return status
}

// validity is for how many seconds the first credential to expire is still good; zero where none expires.
func validity(expires, now time.Time) int64 {
	if expires.IsZero() {
		return 0
	}
	return max(int64(expires.Sub(now).Seconds()), 1)
}

func sourcesReady(c *claim) metav1.Condition {
	if failed := failedSources(c.sources); len(failed) > 0 {
		reason := reasonSourceFailed
		if c.identityChanged {
			reason = reasonIdentityChanged
		}
		return metav1.Condition{Type: v1alpha1.ConditionSourcesReady, Status: metav1.ConditionFalse, Reason: reason,
			Message: fmt.Sprintf("%d of %d sources cannot be used: %s", len(failed), len(c.sources), listed(failed))}
	}
	return metav1.Condition{Type: v1alpha1.ConditionSourcesReady, Status: metav1.ConditionTrue, Reason: reasonReady,
		Message: fmt.Sprintf("%d of %d sources were read", len(c.sources), len(c.sources))}
}

func (t *term) secretsReady(c *claim, s summary) metav1.Condition {
	condition := metav1.Condition{Type: v1alpha1.ConditionSecretsReady, Status: metav1.ConditionFalse}
	progress := fmt.Sprintf("%d of %d selected namespaces have the Secret", s.counts.Delivered, s.counts.Selected)
	switch {
	case c.problem != nil:
		condition.Reason, condition.Message = reasonInvalid, c.problem.Error()+"; what was delivered before stays as it is"
	case c.failure != nil:
		condition.Reason, condition.Message = reasonFailed, "the credentials cannot be rendered, and this will be tried again: "+impsync.Explain(c.failure)
	case len(c.skipped) > 0:
		condition.Reason, condition.Message = reasonInvalid, errors.Join(c.skipped...).Error()+"; this selector is left out, the others are served"
	case c.rendered.Target.IsZero() && !c.withdrawn && len(c.sources) > 0:
		condition.Reason, condition.Message = reasonNothing, "no source has given credentials yet, so there is no Secret to deliver"
	case len(s.failed) > 0:
		condition.Reason, condition.Message = reasonFailed, progress+notOf+listed(s.failed)
	case len(s.undeletable) > 0:
		condition.Reason, condition.Message = reasonFailed, "Secrets that are no longer wanted could not be deleted: "+listed(s.undeletable)
	case s.pending > 0:
		condition.Status, condition.Reason, condition.Message = metav1.ConditionUnknown, reasonProgressing, progress
	default:
		condition.Status, condition.Reason, condition.Message = metav1.ConditionTrue, reasonReady, progress
	}
	if c.selection != nil && c.selection.HasPodRules() {
		if n := t.countNodes(); n.withoutAgent > 0 {
			condition.Message += fmt.Sprintf("; %d of %d nodes have no agent, so that namespaces selected only by Pods there are not seen", n.withoutAgent, n.all)
		}
	}
	return condition
}

// ready sums the other conditions up: false where any is, else unknown where any is.
func ready(conditions []metav1.Condition) metav1.Condition {
	sum := metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionTrue, Reason: reasonReady, Message: "everything that was asked for is done"}
	for _, condition := range conditions {
		if condition.Status == metav1.ConditionTrue || sum.Status == metav1.ConditionFalse {
			continue
		}
		if condition.Status == metav1.ConditionFalse || sum.Status == metav1.ConditionTrue {
			sum.Status, sum.Reason, sum.Message = condition.Status, condition.Reason, condition.Message
		}
	}
	return sum
}

// notOf stands between how many there are and which are not.
const notOf = "; not "

// andMore stands before the number of those that are not listed.
const andMore = "; and "

// listed joins the first few of many.
func listed(all []string) string {
	if len(all) <= listedMax {
		return strings.Join(all, "; ")
	}
	return fmt.Sprintf("%s%s%d more", strings.Join(all[:listedMax], "; "), andMore, len(all)-listedMax)
}

// bounded cuts a message that quotes too much of a spec: the API server would refuse it,
// and the whole status with it.
func bounded(message string) string {
	if len(message) <= messageMax {
		return message
	}
	return strings.ToValidUTF8(message[:messageMax], "") + "..."
}

// writeStatus replaces the whole status, whoever wrote it before, unless the resource is
// another by now.
func (t *term) writeStatus(ctx context.Context, r *v1alpha1.ImagePullSecret, status v1alpha1.ImagePullSecretStatus) error {
	patch, err := json.Marshal([]map[string]any{
		{"op": "test", "path": "/metadata/uid", "value": r.UID},
		{"op": "add", "path": "/status", "value": status},
	})
	if err != nil {
		return fmt.Errorf("encode status: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	return t.images.Patch(types.JSONPatchType).Resource(v1alpha1.Resource.Resource).Name(r.Name).SubResource("status").
		Param("fieldManager", impsync.FieldManager).MaxRetries(0).Body(patch).Do(ctx).Error() // as in impsync.Secrets
}

// emit tells of what has changed for better or worse. The same cause is told once, however
// the numbers around it change.
func (t *term) emit(r *v1alpha1.ImagePullSecret, c *claim, status v1alpha1.ImagePullSecretStatus, s summary) {
	if status.Status == v1alpha1.StatusReady && r.Status.LastSuccessfulReconciliation == nil {
		t.recorder.Event(r, corev1.EventTypeNormal, eventReconciled, status.Conditions[0].Message)
	}
	for _, condition := range status.Conditions[1:] { // the first only sums them up
		reason, cause := eventOf(condition, s)
		t.mu.Lock()
		told := c.told[condition.Type]
		if c.told == nil {
			c.told = map[string]string{}
		}
		c.told[condition.Type] = cause
		t.mu.Unlock()
		was := meta.FindStatusCondition(r.Status.Conditions, condition.Type)
		if cause == "" || cause == told || was != nil && was.Message == condition.Message {
			continue
		}
		t.recorder.Event(r, corev1.EventTypeWarning, reason, condition.Message)
	}
}

// eventOf returns the reason of the Event about a condition, and what caused it, without
// numbers; no cause where the condition is not false.
func eventOf(condition metav1.Condition, s summary) (reason, cause string) {
	switch {
	case condition.Status != metav1.ConditionFalse:
		return "", ""
	case condition.Type == v1alpha1.ConditionSourcesReady:
		return eventSources, condition.Message
	case condition.Reason == reasonNotAllowed:
		return eventFailed, condition.Reason
	case condition.Type == v1alpha1.ConditionServiceAccountsReady:
		return eventAccounts, uncounted(condition.Message)
	case condition.Type == v1alpha1.ConditionKubeletReady:
		return eventKubelet, uncounted(condition.Message)
	case condition.Reason == reasonFailed && len(s.failed) > 0:
		return eventSecrets, strings.Join(s.failed[:min(len(s.failed), listedMax)], "; ")
	case condition.Reason == reasonFailed && len(s.undeletable) > 0:
		return eventSecretDeletion, strings.Join(s.undeletable[:min(len(s.undeletable), listedMax)], "; ")
	default:
		return eventFailed, condition.Message
	}
}

// uncounted is a message without the numbers in it.
func uncounted(message string) string {
	_, why, counted := strings.Cut(message, notOf)
	if !counted {
		why = message
	}
	why, _, _ = strings.Cut(why, andMore)
	return why
}

func (t *term) exportMetrics(resource string, s summary, status v1alpha1.ImagePullSecretStatus) {
	t.metrics.namespaces.WithLabelValues(resource, "selected").Set(float64(s.counts.Selected))
	t.metrics.namespaces.WithLabelValues(resource, "delivered").Set(float64(s.counts.Delivered))
	t.metrics.namespaces.WithLabelValues(resource, "excluded").Set(float64(s.counts.Excluded))
	t.metrics.sources.DeletePartialMatch(prometheus.Labels{"resource": resource}) // also those that are no longer listed
	for source, state := range status.SourceSecretStatus {
		ok := 0.0
		if state == v1alpha1.SourceOK {
			ok = 1
		}
		t.metrics.sources.WithLabelValues(resource, source).Set(ok)
	}
}
