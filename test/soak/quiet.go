package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

const (
	// settleTimeout bounds the time from the last change or fault until all is as it should
	// be. client-go waits up to a minute before it tries a watch again, and longer the more
	// often the API server was away of late.
	settleTimeout = 90 * time.Second
	// calm is longer than a status waits for its next write, which may tell of what the
	// model does not know; silence is how long nothing may be written after that.
	calm, silence = 2 * time.Second, 3 * time.Second
)

// view is what there is.
type view struct {
	secrets   map[key]*corev1.Secret
	resources map[string]*v1alpha1.ImagePullSecret
	rendered  map[types.UID]bool
	states    map[types.UID]bool
	reports   map[string]string // by node
}

func (s *soak) look(ctx context.Context) (*view, error) {
	v := &view{
		secrets: map[key]*corev1.Secret{}, resources: map[string]*v1alpha1.ImagePullSecret{},
		rendered: map[types.UID]bool{}, states: map[types.UID]bool{}, reports: map[string]string{},
	}
	if err := s.lookAtTargets(ctx, v); err != nil {
		return nil, err
	}
	resources, err := s.images().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, item := range resources.Items {
		r := &v1alpha1.ImagePullSecret{}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(item.Object, r); err != nil {
			return nil, err
		}
		v.resources[r.Name] = r
	}
	for namespace, own := range map[string]struct {
		prefix string
		uids   map[types.UID]bool
	}{
		imps.RenderedNamespace: {impsync.RenderedName(""), v.rendered},
		imps.SystemNamespace:   {impsync.StateName(""), v.states},
	} {
		list, err := s.core.CoreV1().Secrets(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, err
		}
		for i := range list.Items {
			if uid, ok := strings.CutPrefix(list.Items[i].Name, own.prefix); ok {
				own.uids[types.UID(uid)] = true
			}
		}
	}
	for _, node := range nodes {
		report, err := s.core.CoreV1().ConfigMaps(imps.SystemNamespace).Get(ctx, impsync.ReportName(node), metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		v.reports[node] = report.Data[impsync.ReportKey]
	}
	return v, nil
}

func (s *soak) lookAtTargets(ctx context.Context, v *view) error {
	for _, name := range targets {
		list, err := s.core.CoreV1().Secrets("").List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
		if err != nil {
			return err
		}
		for i := range list.Items {
			v.secrets[key{list.Items[i].Namespace, name}] = &list.Items[i]
		}
	}
	return nil
}

// glance checks what must hold at any time.
func (s *soak) glance(ctx context.Context) error {
	v := &view{secrets: map[key]*corev1.Secret{}}
	if err := until(ctx, "list the targets", func(ctx context.Context) error { return s.lookAtTargets(ctx, v) }); err != nil {
		return err
	}
	return errors.Join(s.foreignUntouched(v), s.keptStay(v))
}

// foreignUntouched returns an error where a foreign Secret is not as it was left.
func (s *soak) foreignUntouched(v *view) error {
	var errs []error
	for k, f := range s.foreign {
		there := v.secrets[k]
		if there == nil || there.UID != f.uid || there.ResourceVersion != f.resourceVersion {
			errs = append(errs, fmt.Errorf("foreign Secret %s at %s was touched: %s", k, f.resourceVersion, identity(there)))
		}
	}
	return errors.Join(errs...)
}

// keptStay returns an error where a Secret that is wanted all the time is gone, or another by
// now, and nobody but imps can have done it.
func (s *soak) keptStay(v *view) error {
	var errs []error
	for k, kept := range s.keep {
		there := v.secrets[k]
		if there != nil && there.UID == kept.uid {
			continue
		}
		by, err := s.deleters(k)
		switch {
		case err != nil:
			errs = append(errs, err)
		case len(by) == 0 && s.crashed:
			s.unknown++
			delete(s.keep, k)
		default:
			errs = append(errs, fmt.Errorf("target %s %s is wanted all the time (%v) and was replaced: %s; deleted by %v",
				k, kept.uid, slices.Sorted(maps.Keys(kept.reasons)), identity(there), by))
		}
	}
	return errors.Join(errs...)
}

func identity(secret *corev1.Secret) string {
	if secret == nil {
		return "there is none"
	}
	return fmt.Sprintf("there is %s at %s", secret.UID, secret.ResourceVersion)
}

// deleters are who asked for the deletion of a target since the last quiet point.
func (s *soak) deleters(k key) ([]string, error) {
	events, err := s.control.Audit().Since(s.windowBegan)
	if err != nil {
		return nil, err
	}
	var by []string
	for _, e := range events {
		// A server error does not say that nothing was done.
		if e.Resource == "secrets" && e.Verb == "delete" && e.Namespace == k.namespace && e.Name == k.name && (e.Code < 300 || e.Code >= 500) {
			by = append(by, fmt.Sprintf("%s at %s (%d)", e.User, e.Received.Format(time.StampMilli), e.Code))
		}
	}
	return by, nil
}

// quiet waits until all is as it should be, and makes sure that it then stays so.
func (s *soak) quiet(ctx context.Context) error {
	s.note("quiet", "all faults are healed")
	began := time.Now()
	if err := s.fleet.ready(ctx); err != nil {
		return err
	}
	var v *view
	for {
		var wrong []string
		var err error
		if v, err = s.look(ctx); err != nil {
			wrong = []string{err.Error()}
		} else {
			if err := errors.Join(s.foreignUntouched(v), s.keptStay(v)); err != nil {
				return err
			}
			wrong = s.differences(v)
			for _, r := range v.resources {
				if err := s.helpCollector(ctx, r); err != nil {
					return err
				}
			}
			if err := s.fleet.leading(ctx); err != nil {
				wrong = append(wrong, err.Error())
			}
		}
		if len(wrong) == 0 {
			break
		}
		if err := s.fleet.alive(); err != nil {
			return err
		}
		if time.Since(began) > settleTimeout {
			return fmt.Errorf("after %s of quiet:\n  %s", settleTimeout, strings.Join(wrong, "\n  "))
		}
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
	s.settled = append(s.settled, time.Since(began))
	if err := s.silent(ctx, began); err != nil {
		return err
	}
	v, err := s.look(ctx)
	if err != nil {
		return err
	}
	if wrong := s.differences(v); len(wrong) > 0 {
		return fmt.Errorf("all was right, and is not any more:\n  %s", strings.Join(wrong, "\n  "))
	}
	if err := errors.Join(s.foreignUntouched(v), s.keptStay(v), s.lawful(), s.fleet.measure(ctx), s.fleet.readLogs()); err != nil {
		return err
	}
	s.settle(v)
	return nil
}

// silent makes sure that nothing is written for a while. What client-go tells late, as it
// tries a watch again only after a while, may still be written: within the time that it has
// since all faults were healed.
func (s *soak) silent(ctx context.Context, healed time.Time) error {
	if err := pause(ctx, calm); err != nil {
		return err
	}
	for {
		mark := s.control.Audit().Mark()
		if err := pause(ctx, silence); err != nil {
			return err
		}
		writes, err := s.writes(mark)
		if err != nil || len(writes) == 0 {
			return err
		}
		if time.Since(healed) < settleTimeout {
			continue
		}
		var errs []error
		for _, e := range writes {
			errs = append(errs, fmt.Errorf("all is right, and %s writes: %s", e.User, request(e)))
		}
		return errors.Join(errs...)
	}
}

// writes are those of imps, also the ones that failed, without what it may write at any time.
func (s *soak) writes(mark cluster.Mark) ([]cluster.Event, error) {
	events, err := s.control.Audit().Since(mark)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(events, func(e cluster.Event) bool {
		return !slices.Contains([]string{coordinatorUser, agentUser}, e.User) ||
			slices.Contains([]string{"get", "list", "watch"}, e.Verb) ||
			slices.Contains([]string{"leases", "events", "selfsubjectreviews"}, e.Resource)
	}), nil
}

const (
	coordinatorUser = "system:serviceaccount:" + imps.SystemNamespace + ":" + imps.CoordinatorAccount
	agentUser       = "system:serviceaccount:" + imps.SystemNamespace + ":" + imps.AgentAccount
)

func request(e cluster.Event) string {
	return fmt.Sprintf("%s %s %s/%s %s (%d at %s)", e.Verb, e.Resource, e.Namespace, e.Name, e.Subresource, e.Code, e.Received.Format(time.StampMilli))
}

// lawful returns an error where imps has written what is none of its business.
func (s *soak) lawful() error {
	writes, err := s.writes(s.windowBegan)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range writes {
		target := e.Resource == "secrets" && slices.Contains(targets, e.Name)
		allowed := target && (e.User == coordinatorUser || e.Verb == "patch") ||
			e.User == agentUser && e.Resource == "configmaps" && strings.HasPrefix(e.Name, impsync.ReportName("")) ||
			e.User == coordinatorUser && (e.Resource == "imagepullsecrets" && e.Subresource == "status" ||
				e.Resource == "secrets" && e.Namespace == imps.RenderedNamespace ||
				e.Resource == "secrets" && e.Namespace == imps.SystemNamespace)
		if !allowed {
			errs = append(errs, fmt.Errorf("%s may not write that: %s", e.User, request(e)))
		}
	}
	return errors.Join(errs...)
}

// differences are between what there is and what there should be.
func (s *soak) differences(v *view) []string {
	var wrong []string
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }

	for _, name := range slices.Sorted(maps.Keys(v.resources)) {
		if s.resources[name] == nil || s.resources[name].uid != v.resources[name].UID {
			say("resource %s should be gone", name)
		}
	}
	uids := map[types.UID]bool{}
	for name, r := range s.resources {
		uids[r.uid] = true
		if v.resources[name] == nil {
			return append(wrong, "resource "+name+" is gone")
		}
		expected := s.inForce(r)
		if expected == yes && !v.rendered[r.uid] || expected == no && v.rendered[r.uid] {
			say("resource %s has a rendered Secret: %t", name, v.rendered[r.uid])
		}
		if v.rendered[r.uid] && !v.states[r.uid] && !r.stateLost {
			say("resource %s has no state Secret", name)
		}
	}
	for _, there := range []map[types.UID]bool{v.rendered, v.states} {
		for uid := range there {
			if !uids[uid] {
				say("the resource %s is gone, and a Secret of its own is there", uid)
			}
		}
	}
	inForce := func(r *resource) bool { return v.rendered[r.uid] }
	claims := s.claims(inForce)
	wrong = append(wrong, s.targetDifferences(v, claims)...)
	for _, name := range slices.Sorted(maps.Keys(s.resources)) {
		r := s.resources[name]
		wrong = append(wrong, s.contentDifferences(v, r, claims)...)
		wrong = append(wrong, s.statusDifferences(v.resources[name], r, s.status(r, inForce(r), claims))...)
	}
	for _, node := range nodes {
		var report struct{ Demand map[string][]string }
		if err := json.Unmarshal([]byte(v.reports[node]), &report); err != nil {
			say("the report of %s cannot be read", node)
			continue
		}
		if want := s.demand(node, inForce); !maps.EqualFunc(report.Demand, want, slices.Equal) {
			say("the report of %s demands %v, not %v", node, report.Demand, want)
		}
	}
	return wrong
}

// targetDifferences compares which targets there are, and whose they are.
func (s *soak) targetDifferences(v *view, claims map[key][]*resource) []string {
	var wrong []string
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	for _, n := range slices.Sorted(maps.Keys(s.namespaces)) {
		for _, name := range targets {
			k := key{n, name}
			there, claimants := v.secrets[k], claims[k]
			if _, occupied := s.foreign[k]; occupied {
				continue
			}
			switch {
			case there == nil && len(claimants) > 0:
				say("Secret %s is missing; %s wants it", k, claimants[0].name)
			case there != nil && len(claimants) == 0 && !s.mayBeLeft(there):
				say("Secret %s of resource %s is there, and nobody wants it", k, there.Labels[impsync.LabelOwnerUID])
			case there != nil && len(claimants) > 0:
				wrong = append(wrong, s.secretDifferences(k, there, claimants)...)
			}
		}
	}
	return wrong
}

// mayBeLeft reports whether a Secret that nobody selects may be there.
func (s *soak) mayBeLeft(secret *corev1.Secret) bool {
	owner := types.UID(secret.Labels[impsync.LabelOwnerUID])
	if s.left[secret.UID] || s.left[owner] {
		return true
	}
	for _, r := range s.resources {
		if r.uid == owner && r.leftovers {
			return true
		}
	}
	return false
}

// secretDifferences compares one target, but for its credentials.
func (s *soak) secretDifferences(k key, secret *corev1.Secret, claimants []*resource) []string {
	var wrong []string
	say := func(format string, args ...any) {
		wrong = append(wrong, fmt.Sprintf("Secret %s of %s: %s", k, claimants[0].name, fmt.Sprintf(format, args...)))
	}
	winner := claimants[0]
	if owner := secret.Labels[impsync.LabelOwnerUID]; owner != string(winner.uid) {
		say("its owner is %s, not %s", owner, winner.uid)
	}
	var want, have []string
	for _, r := range claimants {
		want = append(want, string(r.uid))
	}
	for _, reference := range secret.OwnerReferences {
		have = append(have, string(reference.UID))
	}
	slices.Sort(want)
	slices.Sort(have)
	if !slices.Equal(want, have) {
		say("its owner references are %v, not %v", have, want)
	}
	for mark := range marks {
		for what, pair := range map[string][2]string{
			"label": {secret.Labels[mark], winner.spec.labels[mark]}, "annotation": {secret.Annotations[mark], winner.spec.annotations[mark]},
		} {
			if pair[0] != pair[1] && (pair[1] != "" || pair[0] != edited && !s.unmanaged[secret.UID]) {
				say("its %s %s is %q, not %q", what, mark, pair[0], pair[1])
			}
		}
	}
	if kept := s.keep[k]; kept != nil && kept.labelled && secret.Labels["mine"] != "x" {
		say("a user's own label is gone")
	}
	if secret.Type != corev1.SecretTypeDockerConfigJson {
		say("its type is %s", secret.Type)
	}
	if !slices.ContainsFunc(secret.ManagedFields, func(e metav1.ManagedFieldsEntry) bool {
		return e.Manager == impsync.FieldManager && e.Operation == metav1.ManagedFieldsOperationApply
	}) {
		say("imps does not manage it")
	}
	return wrong
}

// contentDifferences compares the credentials in all targets of a resource.
func (s *soak) contentDifferences(v *view, r *resource, claims map[key][]*resource) []string {
	var wrong []string
	possible := s.contents(r)
	var first *corev1.Secret
	for _, k := range slices.SortedFunc(maps.Keys(claims), compareKeys) {
		if _, occupied := s.foreign[k]; occupied || claims[k][0] != r || v.secrets[k] == nil {
			continue
		}
		secret := v.secrets[k]
		have, revision := passwordsOf(secret), secret.Annotations[impsync.AnnotationRevision]
		if possible != nil && !slices.ContainsFunc(possible, func(c content) bool { return maps.Equal(c.passwords, have) }) {
			wrong = append(wrong, fmt.Sprintf("Secret %s of %s holds %v; right would be %v", k, r.name, have, passwordsIn(possible)))
		}
		if first == nil {
			first = secret
		}
		if !maps.Equal(passwordsOf(first), have) || first.Annotations[impsync.AnnotationRevision] != revision {
			wrong = append(wrong, fmt.Sprintf("Secrets %s and %s of %s differ", key{first.Namespace, first.Name}, k, r.name))
		}
		if counter := counterOf(r, revision); counter < r.revision {
			wrong = append(wrong, fmt.Sprintf("Secret %s of %s has revision %s after %d", k, r.name, revision, r.revision))
		}
	}
	return wrong
}

func passwordsIn(contents []content) []map[string]string {
	var list []map[string]string
	for _, c := range contents {
		list = append(list, c.passwords)
	}
	return list
}

// counterOf is the counter of a resource's revision, 0 where it is none.
func counterOf(r *resource, revision string) uint64 {
	counter, ok := strings.CutPrefix(revision, string(r.uid)+".")
	n, err := strconv.ParseUint(counter, 10, 64)
	if !ok || err != nil {
		return 0
	}
	return n
}

// passwordsOf are the passwords in a Secret, by registry.
func passwordsOf(secret *corev1.Secret) map[string]string {
	var config struct {
		Auths map[string]struct{ Username, Password string } `json:"auths"`
	}
	passwords := map[string]string{}
	if err := json.Unmarshal(secret.Data[corev1.DockerConfigJsonKey], &config); err != nil || config.Auths == nil {
		passwords["none"] = "cannot be read"
	}
	for registry, auth := range config.Auths {
		passwords[registry] = auth.Password
	}
	return passwords
}

// statusDifferences compares what a resource says about itself.
func (s *soak) statusDifferences(there *v1alpha1.ImagePullSecret, r *resource, want status) []string {
	var wrong []string
	have := there.Status
	say := func(format string, args ...any) {
		wrong = append(wrong, fmt.Sprintf("the status of %s: %s", r.name, fmt.Sprintf(format, args...)))
	}
	if have.ObservedGeneration != there.Generation {
		say("it is about generation %d, not %d", have.ObservedGeneration, there.Generation)
	}
	name := map[bool]string{true: v1alpha1.StatusFailed, false: v1alpha1.StatusReady}[want.failed]
	if have.Status != name || (have.Reason != "") != want.failed {
		say("%q (%s), not %q", have.Status, have.Reason, name)
	}
	if counts := (v1alpha1.NamespaceCounts{Selected: want.selected, Delivered: want.delivered, Excluded: want.excluded}); have.Namespaces == nil || *have.Namespaces != counts {
		say("it counts %+v, not %+v", have.Namespaces, counts)
	}
	if !slices.Equal(have.ManagedNamespaces, want.managed) {
		say("it manages %v, not %v", have.ManagedNamespaces, want.managed)
	}
	if len(have.SourceSecretStatus) != len(r.spec.sources) {
		say("it tells of %d sources, not %d", len(have.SourceSecretStatus), len(r.spec.sources))
	}
	for _, name := range r.spec.sources {
		namespace := imps.SourceNamespace
		if name == elsewhere {
			namespace = elsewhere
		}
		if told := have.SourceSecretStatus[namespace+"."+name]; (told == v1alpha1.SourceOK) != s.isGood(name) {
			say("source %s is %q", name, told)
		}
	}
	for _, c := range have.Conditions {
		if c.Type == v1alpha1.ConditionReady && (c.Status == metav1.ConditionFalse) != want.failed {
			say("the condition Ready is %s", c.Status)
		}
	}
	raw, err := json.Marshal(there)
	if err == nil {
		err = findCanary("resource "+r.name, string(raw))
	}
	if err != nil {
		say("%v", err)
	}
	return wrong
}

// settle takes what there is, and is right, as what the next window begins with.
func (s *soak) settle(v *view) {
	inForce := func(r *resource) bool { return v.rendered[r.uid] }
	claims := s.claims(inForce)
	for _, r := range s.resources {
		r.settled = inForce(r)
		lastGood := map[string]map[int]bool{}
		for _, name := range r.spec.sources {
			lastGood[name] = s.versions(r, name)
		}
		if r.spec.empty() { // it may remember
			for name, versions := range r.lastGood {
				lastGood[name] = maps.Clone(versions)
				lastGood[name][0] = true
			}
		}
		possible := s.contents(r)
		for k, claimants := range claims {
			if _, occupied := s.foreign[k]; occupied || claimants[0] != r {
				continue
			}
			have := passwordsOf(v.secrets[k])
			r.revision = counterOf(r, v.secrets[k].Annotations[impsync.AnnotationRevision])
			if possible == nil {
				continue
			}
			for _, name := range r.spec.sources {
				lastGood[name] = map[int]bool{}
			}
			for _, c := range possible {
				if maps.Equal(c.passwords, have) {
					for name, version := range c.versions {
						lastGood[name][version] = true
					}
				}
			}
		}
		r.lastGood = lastGood
		r.stateLost = r.stateLost && (!v.states[r.uid] || s.anyBroken(r))
		r.leftovers = !r.settled && (r.leftovers || r.emptied || r.renderedLost)
		r.born, r.emptied, r.renderedLost, r.hadGood, r.unlisted = false, false, false, false, map[string]bool{}
	}
	for _, source := range s.sources {
		source.recent, source.wasMissing = nil, source.state == missing
		if source.state == good {
			source.recent = []int{source.now}
		}
	}
	keep := map[key]*kept{}
	for k, secret := range v.secrets {
		n := s.namespaces[k.namespace]
		if _, occupied := s.foreign[k]; occupied || n == nil {
			continue
		}
		entry := &kept{uid: secret.UID, reasons: map[string]bool{}, labelled: s.keep[k] != nil && s.keep[k].labelled}
		for _, r := range claims[k] {
			maps.Copy(entry.reasons, s.reasons(r, n))
			entry.claims(r.uid)
		}
		// What is not wanted, and that the garbage collector does not take either, stays.
		entry.orphan = len(entry.reasons) == 0
		if !entry.orphan || len(secret.OwnerReferences) == 0 {
			keep[k] = entry
		}
	}
	s.keep = keep
	s.window = window{garbled: map[string]bool{}}
	s.windowBegan = s.control.Audit().Mark()
}
