package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

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
	twoWays  = "web"      // loses one of the two ways in which it is selected
	outsider = "sandbox"  // is not selected
	occupied = "legacy"   // has a Secret of that name
)

// subject is a namespace, and how it comes to be selected.
type subject struct {
	namespace string
	by        string // which selector
	trigger   string // what the time is measured from
	pull      func(ctx context.Context, namespace string) error
	uid       types.UID // of its Secret
}

func (d *demo) subjects() []*subject {
	return []*subject{
		{namespace: "shop", by: "namespaces.names", trigger: "created", pull: d.newNamespace},
		{namespace: labelled, by: "namespaces.labels", trigger: "label set", pull: d.setMetadata("labels", namespaceLabels)},
		{namespace: "search", by: "namespaces.annotations", trigger: "annotation set", pull: d.setMetadata("annotations", namespaceAnnotations)},
		{namespace: byPod, by: "namespacesWithPods.labels", trigger: "Pod on node-a", pull: d.newPod("node-a", podLabels, nil)},
		{namespace: "ml", by: "namespacesWithPods.annotations", trigger: "Pod on node-b", pull: d.newPod("node-b", nil, podAnnotations)},
		{namespace: twoWays, by: "namespaces.labels, then a Pod", trigger: "label set", pull: d.setMetadata("labels", namespaceLabels)},
	}
}

// deliver has namespaces selected one after the other, and shows when their Secret is there.
func (d *demo) deliver(ctx context.Context) error {
	var err error
	if d.watcher, err = newWatcher(ctx, d.client); err != nil {
		return err
	}
	d.mark = d.control.Audit().Mark()
	subjects := d.subjects()
	if err := d.prepare(ctx, subjects); err != nil {
		return err
	}
	d.note("ms: from the API server's answer to the trigger until the Secret's event at an independent watcher; " +
		"below zero where the event came before the answer. by: who created it, from the audit log.")
	d.say("")
	widths := []int{9, 30, 14, -6, 11, 17}
	d.row(widths, "namespace", "selected by", "trigger", "ms", "by", "holds")
	for _, s := range subjects {
		if err := d.serve(ctx, s, widths); err != nil {
			return err
		}
	}
	if err := d.newPod("node-b", podLabels, nil)(ctx, twoWays); err != nil {
		return err
	}
	d.row(widths, outsider, "nothing", "Pod on node-a", "-", "-", "no Secret")
	d.check("namespace "+outsider+", which nothing selects, has no Secret", 0, len(d.watcher.in(outsider)))
	return nil
}

// prepare makes the namespaces whose creation is not the trigger, and the Pod that selects nothing.
func (d *demo) prepare(ctx context.Context, subjects []*subject) error {
	names := []string{outsider}
	for _, s := range subjects {
		if s.trigger != "created" {
			names = append(names, s.namespace)
		}
	}
	for _, name := range names {
		if err := d.newNamespace(ctx, name); err != nil {
			return err
		}
	}
	for _, name := range names { // before it has one, a Pod is refused
		if err := eventually(ctx, "namespace "+name+" has a ServiceAccount", func(ctx context.Context) error {
			_, err := d.client.CoreV1().ServiceAccounts(name).Get(ctx, "default", metav1.GetOptions{})
			return err
		}); err != nil {
			return err
		}
	}
	return d.newPod("node-a", map[string]string{"image": "public"}, nil)(ctx, outsider)
}

// serve pulls the trigger of a namespace and waits for its Secret.
func (d *demo) serve(ctx context.Context, s *subject, widths []int) error {
	if err := s.pull(ctx, s.namespace); err != nil {
		return err
	}
	answered := time.Now()
	there, err := d.watcher.await(ctx, s.namespace, "created", created)
	if err != nil {
		return err
	}
	by, err := d.creator(ctx, s.namespace)
	if err != nil {
		return err
	}
	s.uid = there.secret.UID
	d.served = append(d.served, s)
	holds := passwordsIn(there.secret)
	d.row(widths, s.namespace, s.by, s.trigger, milliseconds(there.at.Sub(answered)), by,
		strings.Join(slices.Sorted(maps.Keys(holds)), " "))
	d.check("namespace "+s.namespace+" has the Secret, with the credentials of both sources", d.describe(d.passwords), d.describe(holds))
	return nil
}

// foreign has a namespace selected that has somebody else's Secret where the pull Secret would be.
func (d *demo) foreign(ctx context.Context) error {
	if err := d.newNamespace(ctx, occupied); err != nil {
		return err
	}
	theirs := d.source("other.test", "theirs")
	theirs.Name = secretName
	theirs, err := d.client.CoreV1().Secrets(occupied).Create(ctx, theirs, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("create a foreign Secret: %w", err)
	}
	d.foreignAt = theirs.ResourceVersion
	if err := d.setMetadata("labels", namespaceLabels)(ctx, occupied); err != nil {
		return err
	}
	var status v1alpha1.ImagePullSecretStatus
	if err := eventually(ctx, "the resource tells of the foreign Secret", func(ctx context.Context) (err error) {
		status, err = d.readStatus(ctx)
		if err == nil && !strings.Contains(status.Reason, occupied) {
			err = fmt.Errorf("%q, %s", status.Status, status.Reason)
		}
		return err
	}); err != nil {
		return err
	}
	d.note("Namespace %s is selected now. Its own Secret is left alone, and the resource says so:", occupied)
	for _, condition := range status.Conditions {
		if condition.Type == v1alpha1.ConditionSecretsReady {
			d.showCondition(condition)
		}
	}
	return d.checkForeign(ctx, "when its namespace is selected")
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
	d.passwords[git] = d.passwords[git] + "-new"
	source := d.source(git, d.passwords[git])
	if _, err := d.client.CoreV1().Secrets(sourceNamespace).Update(ctx, source, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("change source %s: %w", source.Name, err)
	}
	answered := time.Now()
	var times []time.Duration
	replaced := []string{}
	for _, s := range d.served {
		changed, err := d.watcher.await(ctx, s.namespace, "new", func(s sighting) bool {
			return s.kind == watch.Modified && maps.Equal(passwordsIn(s.secret), d.passwords)
		})
		if err != nil {
			return err
		}
		times = append(times, changed.at.Sub(answered))
		if changed.secret.UID != s.uid {
			replaced = append(replaced, s.namespace)
		}
	}
	d.note("%s/%s has a new password. So has the first of %d namespaces after %s ms, the last after %s ms.",
		sourceNamespace, source.Name, len(times), milliseconds(slices.Min(times)), milliseconds(slices.Max(times)))
	d.done("every namespace has the new password")
	d.check("no Secret was replaced for that: their UIDs are what they were", []string{}, replaced)
	return nil
}

// prune takes away, one after the other, what selects three namespaces.
func (d *demo) prune(ctx context.Context) error {
	unlabel := d.setMetadata("labels", map[string]any{"pull": nil})
	if err := unlabel(ctx, labelled); err != nil {
		return err
	}
	answered := time.Now()
	gone, err := d.watcher.await(ctx, labelled, "deleted", deleted)
	if err != nil {
		return err
	}
	d.served = slices.DeleteFunc(d.served, func(s *subject) bool { return s.namespace == labelled })
	d.note("%s: its label is removed. The Secret is gone after %s ms.", labelled, milliseconds(gone.at.Sub(answered)))
	d.done("the Secret of " + labelled + ", which lost its label, is gone")

	if err := unlabel(ctx, twoWays); err != nil {
		return err
	}
	if err := d.deletePod(ctx, byPod); err != nil {
		return err
	}
	answered = time.Now()
	if err := eventually(ctx, "node-a no longer demands "+byPod, func(ctx context.Context) error {
		return d.demandEnded(ctx, "node-a", byPod)
	}); err != nil {
		return err
	}
	reported := time.Since(answered)
	select { // what is wrong would show within this time
	case <-time.After(time.Second):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	d.note("%s: its label is removed. The Secret stays: a Pod selects the namespace, too.", twoWays)
	d.note("%s: its only Pod is deleted, and %s ms later the report of node-a no longer asks for it. The Secret stays: "+
		"by design for 60 s, in case the Pod is just being replaced. (The demo does not wait for that.)",
		byPod, milliseconds(reported))
	for _, name := range []string{twoWays, byPod} {
		d.check("the Secret of "+name+" stays", "ADDED, MODIFIED at the watcher", d.watcher.in(name))
	}
	return nil
}

// demandEnded returns an error while the report of a node asks for a namespace.
func (d *demo) demandEnded(ctx context.Context, node, namespace string) error {
	object, err := d.client.CoreV1().ConfigMaps(systemNamespace).Get(ctx, impsync.ReportName(node), metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read the report of %s: %w", node, err)
	}
	report, err := impsync.DecodeReport(object.Data)
	if err == nil && len(report.Demand[namespace]) > 0 {
		err = fmt.Errorf("its report asks for %s", slices.Sorted(maps.Keys(report.Demand)))
	}
	return err
}

// remove deletes the resource; everything that imps made goes with it, and nothing else.
func (d *demo) remove(ctx context.Context) error {
	if err := d.rest().Delete().AbsPath(resources(), resourceName).Do(ctx).Error(); err != nil {
		return fmt.Errorf("delete the ImagePullSecret: %w", err)
	}
	answered := time.Now()
	last := time.Duration(0)
	for _, s := range d.served {
		gone, err := d.watcher.await(ctx, s.namespace, "deleted", deleted)
		if err != nil {
			return err
		}
		last = max(last, gone.at.Sub(answered))
	}
	d.note("The last of %d Secrets is gone after %s ms, the one that lingered among them.", len(d.served), milliseconds(last))
	d.served = nil
	if err := eventually(ctx, "the rendered Secret is gone", func(ctx context.Context) error {
		list, err := d.client.CoreV1().Secrets(renderedNamespace).List(ctx, metav1.ListOptions{})
		if err == nil && len(list.Items) > 0 {
			err = fmt.Errorf("%d Secrets in %s", len(list.Items), renderedNamespace)
		}
		return err
	}); err != nil {
		return err
	}
	d.done("with the resource, everything that imps made is gone")
	d.check("namespace "+outsider+" never had a Secret", 0, len(d.watcher.in(outsider)))
	return d.checkForeign(ctx, "to the end")
}
