package main

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/test/imps"
)

// world is what there should be. Nothing in it depends on how fast anything goes, except
// for what settle and the checks note; the generator never looks at that.
type world struct {
	namespaces map[string]*namespace
	pods       map[string]*pod
	sources    map[string]*source
	resources  map[string]*resource
	foreign    map[key]foreign
	// Names that are free, the one that was given up first in front.
	freeNamespaces, freeResources []string
	// numbers counts what gets a number.
	numbers int
	// gone are the nodes whose object is deleted for the moment.
	gone map[string]bool

	window
	// keep are the Secrets that must stay as the objects they are.
	keep map[key]*kept
	// left are Secrets, and resources whose Secrets, may stay where nothing selects them:
	// what tells that they are imps's was taken from them, or they were orphaned.
	left map[types.UID]bool
	// unmanaged are Secrets whose managedFields somebody has cleared: labels and annotations
	// of a resource that they are handed over from are nobody's, and stay.
	unmanaged map[types.UID]bool
}

// window is what happened since the last quiet point.
type window struct {
	// garbled are the nodes whose report was garbled.
	garbled map[string]bool
	// crashed: the API server was killed, so that the audit log may lack a request.
	crashed bool
}

// key is a target Secret.
type key struct{ namespace, name string }

func (k key) String() string { return k.namespace + "/" + k.name }

func compareKeys(a, b key) int {
	return cmp.Or(cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name))
}

type namespace struct {
	name                string
	labels, annotations map[string]string
	// fixed: it was there before, and stays as it is.
	fixed bool
}

// excluded repeats what the chart is installed with.
func (n *namespace) excluded() bool {
	return strings.HasPrefix(n.name, "kube-") || strings.HasPrefix(n.name, "excluded-")
}

type pod struct {
	name, namespace, node string
	labels, annotations   map[string]string
	fixed                 bool
}

// source is a source Secret.
type source struct {
	name   string
	state  sourceState
	now    int                       // the version, where it is good
	config map[int]map[string]string // password by registry, of each version
	// recent are the versions that were there since the last quiet point.
	recent []int
	// wasMissing: so it was at some time since then.
	wasMissing bool
}

type sourceState int

const (
	missing sourceState = iota
	good
	broken
)

// elsewhere is a source in a namespace that none may be in.
const elsewhere = "elsewhere"

type foreign struct {
	uid             types.UID
	resourceVersion string
}

// kept is a Secret that nobody may replace.
type kept struct {
	uid types.UID
	// reasons are why it is wanted, as far as they hold since the last quiet point.
	reasons map[string]bool
	// orphan: it was left behind, and stays until somebody selects it.
	orphan bool
	// claimants are all resources that have claimed it since the last quiet point.
	claimants map[types.UID]bool
	// labelled: it has a label of a user's own.
	labelled bool
}

// spec is the spec of an ImagePullSecret; empty where it has no target.
type spec struct {
	target              string
	labels, annotations map[string]string // of the target
	sources             []string
	names               []string

	nsLabels, nsAnnotations, podLabels, podAnnotations []selector
}

func (s spec) empty() bool { return s.target == "" }

// resource is an ImagePullSecret.
type resource struct {
	name    string
	uid     types.UID
	created time.Time
	spec    spec

	// As of the last quiet point: whether it was in force, what each source may have given
	// last (versions, 0 for nothing), and the revision of its Secrets.
	settled  bool
	lastGood map[string]map[int]bool
	revision uint64
	// stateLost: its state Secret was deleted, so that a failing source may freeze it.
	stateLost bool
	// leftovers: its Secrets may stay though it is not in force.
	leftovers bool

	// Since the last quiet point; hadGood: it listed a source that could be read.
	born, emptied, renderedLost, hadGood bool
	unlisted                             map[string]bool // sources that it did not list all the time
}

// selector is a list of requirements that must all hold; none matches everything.
type selector []requirement

type requirement struct {
	key      string
	operator string // of metav1.LabelSelector, or Is: it is in matchLabels
	values   []string
}

func (s selector) matches(values map[string]string) bool {
	for _, r := range s {
		value, there := values[r.key]
		listed := there && slices.Contains(r.values, value)
		holds := map[string]bool{"Is": listed, "In": listed, "NotIn": !listed, "Exists": there, "DoesNotExist": !there}
		if !holds[r.operator] {
			return false
		}
	}
	return true
}

func anyMatches(selectors []selector, values map[string]string) bool {
	return slices.ContainsFunc(selectors, func(s selector) bool { return s.matches(values) })
}

// byRule reports whether the namespace is selected for what it is.
func (s spec) byRule(n *namespace) bool {
	return slices.Contains(s.names, n.name) || anyMatches(s.nsLabels, n.labels) || anyMatches(s.nsAnnotations, n.annotations)
}

func (s spec) matchesPod(p *pod) bool {
	return anyMatches(s.podLabels, p.labels) || anyMatches(s.podAnnotations, p.annotations)
}

// reasons are why a resource selects a namespace: a rule, and each of its pods.
func (w *world) reasons(r *resource, n *namespace) map[string]bool {
	reasons := map[string]bool{}
	if n.excluded() || r.spec.empty() {
		return reasons
	}
	if r.spec.byRule(n) {
		reasons[string(r.uid)+" by a rule"] = true
	}
	for _, p := range w.pods {
		if p.namespace == n.name && r.spec.matchesPod(p) {
			reasons[string(r.uid)+" by pod "+p.name] = true
		}
	}
	return reasons
}

// claims are the resources that want each target, the winner first.
func (w *world) claims(inForce func(*resource) bool) map[key][]*resource {
	claims := map[key][]*resource{}
	for _, r := range w.resources {
		if !inForce(r) {
			continue
		}
		for _, n := range w.namespaces {
			if len(w.reasons(r, n)) > 0 {
				k := key{n.name, r.spec.target}
				claims[k] = append(claims[k], r)
			}
		}
	}
	for _, claimants := range claims {
		slices.SortFunc(claimants, func(a, b *resource) int {
			return cmp.Or(a.created.Compare(b.created), cmp.Compare(a.name, b.name))
		})
	}
	return claims
}

// wanted are the targets that some resource asks for and that no foreign Secret occupies,
// sorted, with the resources in an order that does not depend on when they were made.
func (w *world) wanted() ([]key, map[key][]*resource) {
	claims := w.claims(func(r *resource) bool { return !r.spec.empty() })
	for k, claimants := range claims {
		if _, occupied := w.foreign[k]; occupied || w.namespaces[k.namespace].fixed {
			delete(claims, k)
			continue
		}
		slices.SortFunc(claimants, func(a, b *resource) int { return cmp.Compare(a.name, b.name) })
	}
	return slices.SortedFunc(maps.Keys(claims), compareKeys), claims
}

// narrow takes from keep what need not stay any more after a change.
func (w *world) narrow() {
	for _, r := range w.resources {
		r.hadGood = r.hadGood || slices.ContainsFunc(r.spec.sources, w.isGood)
	}
	for k, kept := range w.keep {
		n := w.namespaces[k.namespace]
		_, occupied := w.foreign[k]
		if n == nil || occupied {
			delete(w.keep, k)
			continue
		}
		now, settled := map[string]bool{}, map[string]bool{}
		for _, r := range w.resources {
			if r.spec.target != k.name {
				continue
			}
			reasons := w.reasons(r, n)
			maps.Copy(now, reasons)
			if len(reasons) > 0 {
				kept.claims(r.uid)
			}
			if r.settled {
				maps.Copy(settled, reasons)
			}
		}
		if kept.orphan {
			if len(now) == 0 {
				continue
			}
			kept.orphan, kept.reasons = false, maps.Clone(settled) // adopted, in place
		}
		maps.DeleteFunc(kept.reasons, func(reason string, _ bool) bool { return !settled[reason] })
		if len(kept.reasons) == 0 {
			delete(w.keep, k)
		}
	}
}

// forgetDemand takes the reasons away that only the report of a node tells.
func (w *world) forgetDemand(node string) {
	for _, kept := range w.keep {
		maps.DeleteFunc(kept.reasons, func(reason string, _ bool) bool {
			_, name, ok := strings.Cut(reason, " by pod ")
			return ok && w.pods[name] != nil && w.pods[name].node == node
		})
	}
	w.narrow()
}

func (k *kept) claims(uid types.UID) {
	if k.claimants == nil {
		k.claimants = map[types.UID]bool{}
	}
	k.claimants[uid] = true
}

// orphaned notes what a resource leaves behind, before it goes.
func (w *world) orphaned(r *resource) {
	w.left[r.uid] = true
	for k, claimants := range w.claims(func(r *resource) bool { return !r.spec.empty() }) {
		kept := w.keep[k]
		switch {
		case kept == nil || len(claimants) != 1 || claimants[0] != r:
		case len(kept.claimants) > 1:
			delete(w.keep, k) // perhaps another's that lingers, which may be pruned
		default:
			kept.orphan = true
		}
	}
}

// versions are what a source may have given a resource that lists it, 0 for nothing.
func (w *world) versions(r *resource, name string) map[int]bool {
	s := w.sources[name]
	switch {
	case s == nil || s.state == missing:
		return map[int]bool{0: true}
	case s.state == good:
		return map[int]bool{s.now: true}
	}
	versions := maps.Clone(r.lastGood[name])
	if versions == nil {
		versions = map[int]bool{0: true}
	}
	for _, version := range s.recent {
		versions[version] = true
	}
	if s.wasMissing || r.unlisted[name] || r.born {
		versions[0] = true
	}
	return versions
}

// isGood reports whether a source can be read.
func (w *world) isGood(name string) bool {
	s := w.sources[name]
	return s != nil && s.state == good
}

// anyBroken reports whether a source of the resource is there and cannot be used.
func (w *world) anyBroken(r *resource) bool {
	return slices.ContainsFunc(r.spec.sources, func(name string) bool { s := w.sources[name]; return s != nil && s.state == broken })
}

// force says whether a resource is in force: whether it has a rendered Secret.
type force int

const (
	no force = iota
	yes
	perhaps
)

func (w *world) inForce(r *resource) force {
	if r.spec.empty() {
		return no
	}
	if len(r.spec.sources) == 0 || slices.ContainsFunc(r.spec.sources, w.isGood) {
		return yes
	}
	possible := r.hadGood
	for _, name := range r.spec.sources {
		versions := w.versions(r, name)
		if !versions[0] && !r.stateLost {
			return yes
		}
		possible = possible || len(versions) > 1 || !versions[0]
	}
	switch {
	case r.settled && !r.emptied && !r.renderedLost:
		return yes
	case r.settled || possible:
		return perhaps
	}
	return no
}

// contents are the passwords by registry that the Secrets of a resource may hold, with the
// versions of its sources that make them; nil where anything is right.
func (w *world) contents(r *resource) []content {
	if r.stateLost && w.anyBroken(r) {
		return nil
	}
	all := []content{{passwords: map[string]string{}, versions: map[string]int{}}}
	for _, name := range r.spec.sources {
		var next []content
		for _, c := range all {
			for version := range w.versions(r, name) {
				more := content{maps.Clone(c.passwords), maps.Clone(c.versions)}
				if version != 0 {
					maps.Copy(more.passwords, w.sources[name].config[version])
				}
				more.versions[name] = version
				next = append(next, more)
			}
		}
		if all = next; len(all) > 4096 {
			return nil
		}
	}
	return all
}

type content struct {
	passwords map[string]string
	versions  map[string]int
}

// status is what the status of a resource should say.
type status struct {
	selected, delivered, excluded int64
	managed                       []string
	failed                        bool
}

func (w *world) status(r *resource, inForce bool, claims map[key][]*resource) status {
	s := status{managed: []string{}}
	for _, name := range r.spec.sources {
		s.failed = s.failed || !w.isGood(name)
	}
	if !inForce {
		return s
	}
	for _, n := range w.namespaces {
		if n.excluded() {
			if r.spec.byRule(n) {
				s.excluded++
			}
			continue
		}
		k := key{n.name, r.spec.target}
		claimants := claims[k]
		if !slices.Contains(claimants, r) {
			continue
		}
		s.selected++
		if _, occupied := w.foreign[k]; occupied || claimants[0] != r {
			s.failed = true
			continue
		}
		s.delivered++
		s.managed = append(s.managed, n.name)
	}
	slices.Sort(s.managed)
	return s
}

// demand is what the report of a node should say.
func (w *world) demand(node string, inForce func(*resource) bool) map[string][]string {
	demand := map[string][]string{}
	for _, n := range w.namespaces {
		if n.excluded() {
			continue
		}
		for _, r := range w.resources {
			if !inForce(r) {
				continue
			}
			for _, p := range w.pods {
				if p.namespace == n.name && p.node == node && r.spec.matchesPod(p) {
					demand[n.name] = append(demand[n.name], string(r.uid))
					break
				}
			}
		}
		slices.Sort(demand[n.name])
		if len(demand[n.name]) == 0 {
			delete(demand, n.name)
		}
	}
	return demand
}

// object is the spec as the API has it.
func (s spec) object() map[string]any {
	credentials := []any{}
	for _, name := range s.sources {
		namespace := imps.SourceNamespace
		if name == elsewhere {
			namespace = elsewhere
		}
		credentials = append(credentials, map[string]any{"name": name, "namespace": namespace})
	}
	names := []any{}
	for _, name := range s.names {
		names = append(names, name)
	}
	return map[string]any{
		"registry": map[string]any{"credentials": credentials},
		"target": map[string]any{
			"secret": map[string]any{"name": s.target, "labels": values(s.labels), "annotations": values(s.annotations)},
			"namespaces": map[string]any{
				"names": names, "labels": selectors(s.nsLabels, "matchLabels"), "annotations": selectors(s.nsAnnotations, "matchAnnotations"),
			},
			"namespacesWithPods": map[string]any{
				"labels": selectors(s.podLabels, "matchLabels"), "annotations": selectors(s.podAnnotations, "matchAnnotations"),
			},
		},
	}
}

func values(m map[string]string) map[string]any {
	object := map[string]any{}
	for k, v := range m {
		object[k] = v
	}
	return object
}

func selectors(all []selector, match string) []any {
	objects := []any{}
	for _, s := range all {
		object, is, expressions := map[string]any{}, map[string]any{}, []any{}
		for _, r := range s {
			if r.operator == "Is" {
				is[r.key] = r.values[0]
				continue
			}
			expression := map[string]any{"key": r.key, "operator": r.operator}
			if len(r.values) > 0 {
				list := []any{}
				for _, v := range r.values {
					list = append(list, v)
				}
				expression["values"] = list
			}
			expressions = append(expressions, expression)
		}
		if len(is) > 0 {
			object[match] = is
		}
		if len(expressions) > 0 {
			object["matchExpressions"] = expressions
		}
		objects = append(objects, object)
	}
	return objects
}
