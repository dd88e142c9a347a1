package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// Namespaces that have parts of their own to play.
const (
	labelled = "payments" // loses its label
	byPod    = "batch"    // loses its Pod
	twoWays  = "web"      // loses one of the two
	outsider = "sandbox"  // is not selected
	occupied = "legacy"   // has a Secret of that name
)

// subject is a namespace, and how it comes to be selected.
type subject struct {
	namespace string
	by        string // which selector
	trigger   string // what the time is measured from
	act       func(ctx context.Context, namespace string) error
	uid       types.UID // of its Secret
}

func (d *demo) subjects() []*subject {
	created := func(ctx context.Context, namespace string) error { return d.namespace(ctx, namespace) }
	return []*subject{
		{namespace: "shop", by: "namespaces.names", trigger: "created", act: created},
		{namespace: labelled, by: "namespaces.labels", trigger: "label set", act: d.metadata("labels", namespaceLabels)},
		{namespace: "search", by: "namespaces.annotations", trigger: "annotation set", act: d.metadata("annotations", namespaceAnnotations)},
		{namespace: byPod, by: "namespacesWithPods.labels", trigger: "Pod on node-a", act: d.pod("node-a", podLabels, nil)},
		{namespace: "ml", by: "namespacesWithPods.annotations", trigger: "Pod on node-b", act: d.pod("node-b", nil, podAnnotations)},
		{namespace: twoWays, by: "namespaces.labels, and a Pod", trigger: "label set", act: d.metadata("labels", namespaceLabels)},
	}
}

// deliver has namespaces selected one after the other, and shows when their Secret is there.
func (d *demo) deliver(ctx context.Context) error {
	var err error
	if d.watcher, err = newWatcher(ctx, d.client); err != nil {
		return err
	}
	d.mark = d.control.Audit().Mark()
	if err := d.prepare(ctx); err != nil {
		return err
	}
	d.paragraph("   ", "ms: from the API server's answer to the trigger until the Secret's event at an independent watcher; "+
		"below zero where the event was faster than the answer. By: who created it, as the audit log has it.")
	d.say("")
	t := table{printer: d.printer, widths: []int{9, 30, 14, -6, 11}}
	t.row("namespace", "selected by", "trigger", "ms", "by", "holds")
	for _, s := range d.subjects() {
		if err := d.serve(ctx, s, t); err != nil {
			return err
		}
	}
	if err := d.pod("node-b", podLabels, nil)(ctx, twoWays); err != nil {
		return err
	}
	d.check("namespace "+outsider+", which nothing selects, has no Secret", "nothing", describe(d.watcher.in(outsider)))
	t.row(outsider, "nothing", "Pod on node-a", "-", "-", "no Secret")
	return nil
}

// prepare makes all namespaces but the one that is selected from its very beginning, and the Pod
// that selects nothing.
func (d *demo) prepare(ctx context.Context) error {
	names := []string{outsider}
	for _, s := range d.subjects() {
		if s.trigger != "created" {
			names = append(names, s.namespace)
		}
	}
	for _, name := range names {
		if err := d.namespace(ctx, name); err != nil {
			return err
		}
	}
	for _, name := range names { // no Pod is allowed before
		if err := eventually(ctx, "namespace "+name+" has a ServiceAccount", func(ctx context.Context) error {
			_, err := d.client.CoreV1().ServiceAccounts(name).Get(ctx, "default", metav1.GetOptions{})
			return err
		}); err != nil {
			return err
		}
	}
	return d.pod("node-a", map[string]string{"image": "public"}, nil)(ctx, outsider)
}

// serve pulls the trigger of a namespace and waits for its Secret.
func (d *demo) serve(ctx context.Context, s *subject, t table) error {
	if err := s.act(ctx, s.namespace); err != nil {
		return err
	}
	answered := time.Now()
	there, err := d.watcher.await(ctx, s.namespace, "is created", func(s sighting) bool { return s.kind == watch.Added })
	if err != nil {
		return err
	}
	s.uid = there.secret.UID
	d.served = append(d.served, s)
	by, err := d.creator(ctx, s.namespace)
	if err != nil {
		return err
	}
	holds := passwordsIn(there.secret)
	d.check("namespace "+s.namespace+" has the Secret with the credentials of both sources", true, maps.Equal(holds, d.passwords))
	t.row(s.namespace, s.by, s.trigger, milliseconds(there.at.Sub(answered)), by, strings.Join(slices.Sorted(maps.Keys(holds)), " "))
	return nil
}

// foreign has a namespace selected that has somebody else's Secret where the pull Secret would be.
func (d *demo) foreign(ctx context.Context) error {
	if err := d.namespace(ctx, occupied); err != nil {
		return err
	}
	theirs := d.source("other.test")
	theirs.Name = secretName
	theirs, err := d.client.CoreV1().Secrets(occupied).Create(ctx, theirs, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("create a foreign Secret: %w", err)
	}
	d.foreignAt = theirs.ResourceVersion
	if err := d.metadata("labels", namespaceLabels)(ctx, occupied); err != nil {
		return err
	}
	var condition metav1.Condition
	if err := eventually(ctx, "the resource tells of the foreign Secret", func(ctx context.Context) error {
		r, err := d.readResource(ctx)
		if err != nil {
			return err
		}
		for _, condition = range r.Status.Conditions {
			if condition.Type == v1alpha1.ConditionSecretsReady && condition.Status == metav1.ConditionFalse && strings.Contains(condition.Message, occupied) {
				return nil
			}
		}
		return fmt.Errorf("conditions %v", r.Status.Conditions)
	}); err != nil {
		return err
	}
	d.say("   Namespace %s is selected now. It is left as it is, the others are served, the resource says why:", occupied)
	d.showCondition(condition)
	return d.checkForeign(ctx, "after its namespace was selected")
}

// checkForeign makes sure that nobody has touched the foreign Secret.
func (d *demo) checkForeign(ctx context.Context, when string) error {
	theirs, err := d.client.CoreV1().Secrets(occupied).Get(ctx, secretName, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read the foreign Secret: %w", err)
	}
	d.check("the foreign Secret is untouched "+when, d.foreignAt, theirs.ResourceVersion)
	return nil
}

// rotate changes a source and waits until every namespace has what is new.
func (d *demo) rotate(ctx context.Context) error {
	d.newPassword(git)
	source := d.source(git)
	if _, err := d.client.CoreV1().Secrets(sourceNamespace).Update(ctx, source, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("change source %s: %w", source.Name, err)
	}
	answered := time.Now()
	var times []time.Duration
	uids := true
	for _, s := range d.served {
		changed, err := d.watcher.await(ctx, s.namespace, "holds the new password", func(s sighting) bool {
			return s.kind == watch.Modified && maps.Equal(passwordsIn(s.secret), d.passwords)
		})
		if err != nil {
			return err
		}
		times = append(times, changed.at.Sub(answered))
		uids = uids && changed.secret.UID == s.uid
	}
	d.say("   A new password in %s/%s. It is in the first of %d namespaces after %s ms, in the last after %s ms.",
		sourceNamespace, source.Name, len(times), milliseconds(slices.Min(times)), milliseconds(slices.Max(times)))
	d.check("every namespace has the new password, in the same Secret as before (same UID)", true, uids)
	return nil
}

// prune takes away, one after the other, what selects three namespaces.
func (d *demo) prune(ctx context.Context) error {
	unlabel := d.metadata("labels", map[string]any{"pull": nil})
	if err := unlabel(ctx, labelled); err != nil {
		return err
	}
	answered := time.Now()
	gone, err := d.watcher.await(ctx, labelled, "is deleted", deleted)
	if err != nil {
		return err
	}
	d.say("   %s: the label is removed; the Secret is gone after %s ms", labelled, milliseconds(gone.at.Sub(answered)))
	d.ok("the Secret of " + labelled + " is gone once the label is")
	d.drop(labelled)

	if err := unlabel(ctx, twoWays); err != nil {
		return err
	}
	if err := d.deletePods(ctx, byPod); err != nil {
		return err
	}
	answered = time.Now()
	if err := eventually(ctx, "node-a no longer demands "+byPod, func(ctx context.Context) error { return d.demandEnded(ctx, "node-a", byPod) }); err != nil {
		return err
	}
	d.say("   %s: the label is removed; the Secret stays, since a Pod selects the namespace too", twoWays)
	d.say("   %s: the last Pod is deleted, node-a's report says so after %s ms; the Secret stays for 60 s", byPod, milliseconds(time.Since(answered)))
	d.paragraph("      ", "more by design: removed at once, it would fail the next Pod's pull where one is just being replaced")
	if d.patient {
		if err := d.outwait(ctx, answered); err != nil {
			return err
		}
	} else {
		d.say("      (LINGER=1 make demo waits for it)")
		d.stays(byPod)
	}
	d.stays(twoWays)
	return nil
}

// outwait waits until the Secret of a namespace without Pods has had its minute.
func (d *demo) outwait(ctx context.Context, from time.Time) error {
	const minute = time.Minute
	timer := time.NewTimer(minute - time.Since(from))
	defer timer.Stop()
	select {
	case <-timer.C:
		d.stays(byPod)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	gone, err := d.watcher.await(ctx, byPod, "is deleted", deleted)
	if err != nil {
		return err
	}
	d.say("   %s: the Secret is gone after %.1f s", byPod, gone.at.Sub(from).Seconds())
	d.ok("the Secret of " + byPod + " is gone a minute after the last Pod")
	d.drop(byPod)
	return nil
}

// drop takes a namespace off those that have the Secret.
func (d *demo) drop(namespace string) {
	d.served = slices.DeleteFunc(d.served, func(s *subject) bool { return s.namespace == namespace })
}

func deleted(s sighting) bool { return s.kind == watch.Deleted }

// stays checks that the Secret of a namespace is as it was after the rotation.
func (d *demo) stays(namespace string) {
	d.check("the Secret of "+namespace+" stays", "ADDED, MODIFIED", describe(d.watcher.in(namespace)))
}

// demandEnded returns an error while a node's report still asks for a namespace.
func (d *demo) demandEnded(ctx context.Context, node, namespace string) error {
	object, err := d.client.CoreV1().ConfigMaps(systemNamespace).Get(ctx, impsync.ReportName(node), metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read the report of %s: %w", node, err)
	}
	report, err := impsync.DecodeReport(object.Data)
	if err != nil {
		return err
	}
	if _, ok := report.Demand[namespace]; ok {
		return fmt.Errorf("the report of %s demands %s", node, namespace)
	}
	return nil
}

// remove deletes the resource; everything that imps made goes with it, and nothing else.
func (d *demo) remove(ctx context.Context) error {
	if err := d.images().Delete().AbsPath(path, resourceName).Do(ctx).Error(); err != nil {
		return fmt.Errorf("delete the ImagePullSecret: %w", err)
	}
	answered := time.Now()
	last := time.Duration(0)
	for _, s := range d.served {
		gone, err := d.watcher.await(ctx, s.namespace, "is deleted", deleted)
		if err != nil {
			return err
		}
		last = max(last, gone.at.Sub(answered))
	}
	d.say("   The last of %d Secrets is gone after %s ms; nothing lingers.", len(d.served), milliseconds(last))
	if err := eventually(ctx, "the rendered Secret is gone", func(ctx context.Context) error {
		list, err := d.client.CoreV1().Secrets(renderedNamespace).List(ctx, metav1.ListOptions{})
		if err == nil && len(list.Items) > 0 {
			err = fmt.Errorf("%d Secrets in %s", len(list.Items), renderedNamespace)
		}
		return err
	}); err != nil {
		return err
	}
	d.ok("with the resource, everything that imps made is gone")
	d.check("namespace "+outsider+" never had a Secret", "nothing", describe(d.watcher.in(outsider)))
	return d.checkForeign(ctx, "to the end")
}

// namespace creates a namespace.
func (d *demo) namespace(ctx context.Context, name string) error {
	if _, err := d.client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("create namespace %s: %w", name, err)
	}
	return nil
}

// metadata returns a function that sets labels or annotations of a namespace; nil removes one.
func (d *demo) metadata(field string, values any) func(context.Context, string) error {
	return func(ctx context.Context, namespace string) error {
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{field: values}})
		if err != nil {
			return fmt.Errorf("encode a patch: %w", err)
		}
		if _, err := d.client.CoreV1().Namespaces().Patch(ctx, namespace, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			return fmt.Errorf("change %s of namespace %s: %w", field, namespace, err)
		}
		return nil
	}
}

// pod returns a function that creates a Pod as the scheduler leaves it: bound to a node, not started.
func (d *demo) pod(node string, labels, annotations map[string]string) func(context.Context, string) error {
	return func(ctx context.Context, namespace string) error {
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "app", Labels: labels, Annotations: annotations},
			Spec: corev1.PodSpec{
				NodeName:         node,
				Containers:       []corev1.Container{{Name: "app", Image: git + "/app"}},
				ImagePullSecrets: []corev1.LocalObjectReference{{Name: secretName}},
			},
		}
		if _, err := d.client.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("create a Pod in %s: %w", namespace, err)
		}
		return nil
	}
}

// deletePods deletes the Pod of a namespace at once, as there is no kubelet to end it.
func (d *demo) deletePods(ctx context.Context, namespace string) error {
	now := int64(0)
	if err := d.client.CoreV1().Pods(namespace).Delete(ctx, "app", metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		return fmt.Errorf("delete the Pod in %s: %w", namespace, err)
	}
	return nil
}

// wait says what there is to try, and waits for Ctrl-C.
func (d *demo) wait(ctx context.Context) error {
	d.say(`
   export KUBECONFIG=%s
   kubectl get imps
   kubectl describe imps %s
   kubectl get secrets -A --field-selector metadata.name=%s

   kubectl create namespace mine && kubectl label namespace mine pull=private   # gets the Secret
   kubectl -n search edit secret %s                               # is repaired
   kubectl -n %s delete secret %s                               # the foreign one: then all is Ready

   Where kubectl is missing, it is built from the module that the control plane is from:
   alias kubectl='go run -C test/cluster/modules/kubernetes k8s.io/kubernetes/cmd/kubectl'
`, d.control.Kubeconfig(), resourceName, secretName, secretName, occupied, secretName)
	for _, p := range d.processes {
		d.say("   %-12s  metrics http://%s/metrics, log %s", p.name, p.address("metricsAddr"), p.log)
	}
	d.say("\n   Ctrl-C ends it and removes everything.")
	d.waiting = true
	<-ctx.Done()
	return context.Cause(ctx)
}
