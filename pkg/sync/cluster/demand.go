package cluster

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	impsync "github.com/imps-node/imps/pkg/sync"
)

// demandKey: Pods in the namespace match the Pod rules of the resource.
type demandKey struct {
	namespace string
	uid       types.UID
}

func (k demandKey) compare(other demandKey) int {
	return cmp.Or(strings.Compare(k.namespace, other.namespace), strings.Compare(string(k.uid), string(other.uid)))
}

// demandState is what is known of one demand.
type demandState struct {
	// nodes is how many node reports demand it.
	nodes int
	// ended is when nodes became zero.
	ended time.Time
	// unknown: no demand was seen in this term; there is a Secret, and nothing tells why.
	unknown bool
}

// demand is the sum of all node reports.
type demand struct {
	// byNode is sorted, and holds nothing twice.
	byNode map[string][]demandKey
	states map[demandKey]*demandState
}

// replace takes over what a node demands, sorted and nothing twice, and returns the demands
// that began or ended with it. An end is remembered where keep says that it matters.
func (d *demand) replace(node string, current []demandKey, now time.Time, keep func(demandKey) bool) (changed []demandKey) {
	was := d.byNode[node]
	for _, key := range current {
		if _, ok := slices.BinarySearchFunc(was, key, demandKey.compare); ok {
			continue
		}
		state := d.states[key]
		if state == nil {
			state = &demandState{}
			d.states[key] = state
		}
		state.unknown = false
		if state.nodes++; state.nodes == 1 {
			changed = append(changed, key)
		}
	}
	for _, key := range was {
		if _, ok := slices.BinarySearchFunc(current, key, demandKey.compare); ok {
			continue
		}
		state := d.states[key]
		if state.nodes--; state.nodes == 0 {
			state.ended = now
			changed = append(changed, key)
			if !keep(key) {
				delete(d.states, key)
			}
		}
	}
	if len(current) == 0 {
		delete(d.byNode, node)
	} else {
		d.byNode[node] = current
	}
	return changed
}

// linger starts the time that a Secret stays for which no demand is known (yet).
func (d *demand) linger(key demandKey, now time.Time) *demandState {
	state := &demandState{ended: now, unknown: true}
	d.states[key] = state
	return state
}

// forget drops the memory of a demand that ended.
func (d *demand) forget(key demandKey) {
	if state := d.states[key]; state != nil && state.nodes == 0 {
		delete(d.states, key)
	}
}

// reportChanged takes over a node report. A report that cannot be read changes nothing:
// the last readable one stays in force.
func (t *term) reportChanged(key types.NamespacedName, old, current *reportObject) {
	// A report that can be read names the node that its name does; one that could not be at
	// last ends what it said before.
	node := nodeOfReport(key.Name)
	if readable := func(r *reportObject) bool { return r != nil && r.err == nil }; readable(old) != readable(current) {
		defer func() {
			t.checkReport(node)
			t.updateNodesWithoutAgent()
		}()
	}
	if current != nil && current.err != nil {
		t.log.Warn("cannot read a node report, going on with its last readable form", "report", key.Name, "error", current.err)
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.readFormats(node, current)
	if current == nil {
		current = &reportObject{}
	}
	t.stuckChanged(node, current.stuck)
	if old == nil || !equality.Semantic.DeepEqual(old.kubelet, current.kubelet) {
		t.kubeletsChanged()
	}
	keep := func(key demandKey) bool { return t.byUID[key.uid] != nil }
	for _, changed := range t.demand.replace(node, current.demand, time.Now(), keep) {
		if claim := t.claims[changed.uid]; claim != nil {
			t.targetQueue.AddAfter(targetKey{changed.namespace, claim.rendered.Target.Name()}, demandDelay)
			t.enqueueAccounts(changed.namespace)
		}
	}
}

// readFormats takes over which versions of the rendered form an agent reads, none where its
// report is gone. The caller holds the lock.
func (t *term) readFormats(node string, report *reportObject) {
	newest := t.newestReadable()
	for _, version := range t.formats[node] {
		t.readers[version]--
	}
	delete(t.formats, node)
	if report != nil {
		t.formats[node] = slices.Compact(slices.Sorted(slices.Values(report.formats)))
		for _, version := range t.formats[node] {
			t.readers[version]++
		}
	}
	if t.newestReadable() != newest {
		for uid := range t.claims {
			t.resourceQueue.Add(uid)
		}
	}
}

// formatVersion returns the version in which a rendered Secret is to be written that is
// there in version current, 0 for none: the newest that every agent reads. Where there is
// no such version it stays as it is: agents keep the last form that they could read.
func (t *term) formatVersion(current int) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return cmp.Or(t.newestReadable(), current, t.config.FormatVersions[0])
}

// newestReadable is the newest of our versions that all reports name, 0 where there is
// none. The caller holds the lock.
func (t *term) newestReadable() int {
	for _, version := range slices.Backward(t.config.FormatVersions) {
		if t.readers[version] == len(t.formats) {
			return version
		}
	}
	return 0
}

// nodeOfReport is the node that a report is named after.
func nodeOfReport(name string) string { return strings.TrimPrefix(name, impsync.ReportName("")) }

// confirmUndemanded reads all reports and returns errBehind where one of them demands
// something in the namespace that no watch has told of.
func (t *term) confirmUndemanded(ctx context.Context, namespace string) error {
	reported, err := t.readReports.do(func() (map[string][]types.UID, error) {
		// The read is shared, so that it must not end with the one who asked first.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), impsync.CallTimeout)
		defer cancel()
		list, err := t.core.ConfigMaps(t.config.Namespace).List(ctx, metav1.ListOptions{
			LabelSelector: impsync.LabelComponent + "=" + impsync.ComponentReport,
		})
		if err != nil {
			return nil, passing("read the node reports", err)
		}
		demanded := map[string][]types.UID{}
		for i := range list.Items {
			r := reportOf(&list.Items[i])
			if r.err != nil {
				continue // the last readable one counts, which a watch has told of
			}
			for _, key := range r.demand {
				demanded[key.namespace] = append(demanded[key.namespace], key.uid)
			}
		}
		return demanded, nil
	})
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, uid := range reported[namespace] {
		if state := t.demand.states[demandKey{namespace, uid}]; state == nil || state.nodes == 0 {
			return errBehind
		}
	}
	return nil
}

func (t *term) nodeChanged(key types.NamespacedName, old, current *struct{}) {
	if old != nil && current != nil {
		return
	}
	t.change(func() {
		if current == nil {
			t.nodeGone[key.Name] = time.Now()
		} else {
			delete(t.nodeGone, key.Name)
			delete(t.reportDropped, key.Name)
		}
	})
	t.checkReport(key.Name)
	t.updateNodesWithoutAgent()
}

// checkReport has the report of a node dropped later, if the node is not there.
func (t *term) checkReport(node string) {
	if !t.hasStarted() {
		return
	}
	if _, ok := t.nodes.Get(types.NamespacedName{Name: node}); !ok {
		t.reportQueue.AddAfter(node, t.config.ReportLinger)
	}
}

// dropReport deletes the report of a node that is gone, once: one that comes back has an
// agent that lives without the Node.
func (t *term) dropReport(ctx context.Context, node string) error {
	if _, ok := t.nodes.Get(types.NamespacedName{Name: node}); ok {
		return nil
	}
	name := impsync.ReportName(node)
	report, ok := t.reports.Get(types.NamespacedName{Namespace: t.config.Namespace, Name: name})
	t.mu.Lock()
	left := t.config.ReportLinger - time.Since(t.nodeGone[node])
	if !ok || left <= 0 {
		delete(t.nodeGone, node)
	}
	dropped := t.reportDropped[node]
	t.mu.Unlock()
	if !ok || dropped {
		return nil
	}
	if left > 0 { // it was back in between
		t.reportQueue.AddAfter(node, left)
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	err := t.core.ConfigMaps(t.config.Namespace).Delete(ctx, name, metav1.DeleteOptions{
		Preconditions: &metav1.Preconditions{UID: &report.uid, ResourceVersion: &report.resourceVersion},
	})
	if err == nil {
		t.change(func() { t.reportDropped[node] = true })
	}
	return err
}

// updateNodesWithoutAgent tells the metric, and the resources whose status says it.
func (t *term) updateNodesWithoutAgent() {
	if !t.hasStarted() {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.kubeletsChanged()
	t.withoutAgent = t.countNodes().withoutAgent // under the lock, so that the last count wins
	t.metrics.withoutAgent.Set(float64(t.withoutAgent))
	for uid, claim := range t.claims {
		if claim.selection != nil && claim.selection.HasPodRules() {
			t.statusDirty(uid)
		}
	}
}

func (t *term) hasStarted() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.started
}
