package main

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/types"
)

func TestSelectors(t *testing.T) {
	is := requirement{"team", "Is", []string{"red"}}
	for name, c := range map[string]struct {
		selector selector
		red      bool // matches team=red
		none     bool // matches what has no label
	}{
		"an empty one matches everything":     {selector{}, true, true},
		"a label must be there as it is":      {selector{is}, true, false},
		"one of several values":               {selector{{"team", "In", []string{"blue", "red"}}}, true, false},
		"none of several values, or no label": {selector{{"team", "NotIn", []string{"red"}}}, false, true},
		"a label must be there":               {selector{{"team", "Exists", nil}}, true, false},
		"a label must not be there":           {selector{{"team", "DoesNotExist", nil}}, false, true},
		"all must hold":                       {selector{is, {"tier", "Exists", nil}}, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, c.red, c.selector.matches(map[string]string{"team": "red"}))
			require.Equal(t, c.none, c.selector.matches(nil))
		})
	}
}

// smallWorld has a namespace with a pod, an excluded one, and two sources.
func smallWorld() *world {
	return &world{
		namespaces: map[string]*namespace{"a": {name: "a", labels: map[string]string{"team": "red"}}, "excluded-a": {name: "excluded-a"}},
		pods:       map[string]*pod{"p": {name: "p", namespace: "a", node: "node-a", labels: map[string]string{"app": "web"}}},
		sources: map[string]*source{
			"one": {name: "one", state: good, now: 1, recent: []int{1}, config: map[int]map[string]string{1: {"r": "one", "s": "one"}}},
			"two": {name: "two", state: good, now: 2, recent: []int{2}, config: map[int]map[string]string{2: {"r": "two"}, 3: {"r": "three"}}},
		},
		resources: map[string]*resource{}, foreign: map[key]foreign{}, keep: map[key]*kept{}, left: map[types.UID]bool{}, unmanaged: map[types.UID]bool{},
	}
}

func (w *world) add(name string, created int64, s spec) *resource {
	r := &resource{name: name, uid: types.UID(name), created: time.Unix(created, 0), spec: s, settled: true, unlisted: map[string]bool{}}
	w.resources[name] = r
	return r
}

func anyOf(*resource) bool { return true }

func TestTheOlderClaimsATargetAndTheStatusSaysSo(t *testing.T) {
	w := smallWorld()
	all := []selector{{}}
	younger := w.add("x", 2, spec{target: "t", nsLabels: all, sources: []string{"one"}})
	older := w.add("y", 1, spec{target: "t", podLabels: []selector{{{"app", "Is", []string{"web"}}}}, sources: []string{"one"}})
	claims := w.claims(anyOf)
	require.Equal(t, map[key][]*resource{{"a", "t"}: {older, younger}}, claims)
	require.Equal(t, status{selected: 1, delivered: 1, managed: []string{"a"}}, w.status(older, true, claims))
	require.Equal(t, status{selected: 1, excluded: 1, managed: []string{}, failed: true}, w.status(younger, true, claims))
	require.Equal(t, map[string][]string{"a": {"y"}}, w.demand("node-a", anyOf))
	require.Empty(t, w.demand("node-b", anyOf))
}

func TestWhatTheSecretsOfAResourceMayHold(t *testing.T) {
	passwords := func(w *world, r *resource) (all []map[string]string) {
		for _, c := range w.contents(r) {
			all = append(all, c.passwords)
		}
		return all
	}
	w := smallWorld()
	r := w.add("x", 1, spec{target: "t", sources: []string{"one", "two"}})
	require.ElementsMatch(t, []map[string]string{{"r": "two", "s": "one"}}, passwords(w, r), "the last listed wins")
	r.lastGood = map[string]map[int]bool{"two": {2: true}}
	w.sources["two"].state = broken
	require.ElementsMatch(t, []map[string]string{{"r": "two", "s": "one"}}, passwords(w, r), "a broken one keeps its last good")
	w.sources["two"].recent = []int{2, 3}
	require.ElementsMatch(t, []map[string]string{{"r": "two", "s": "one"}, {"r": "three", "s": "one"}}, passwords(w, r),
		"which may be any that was there of late")
	w.sources["two"].state = missing
	require.ElementsMatch(t, []map[string]string{{"r": "one", "s": "one"}}, passwords(w, r), "one that is deleted gives nothing")
	require.Equal(t, yes, w.inForce(r))
	w.sources["one"].state = missing
	require.Equal(t, yes, w.inForce(r), "one that was rendered stays so")
	r.settled = false
	w.sources["one"].recent, w.sources["two"].recent = nil, nil
	require.Equal(t, no, w.inForce(r), "without any source nothing is")
}

func TestWhatMustStay(t *testing.T) {
	k := key{"a", "t"}
	byRule := spec{target: "t", names: []string{"a"}, sources: []string{"one"}}
	byPod := spec{target: "t", podLabels: []selector{{}}, sources: []string{"one"}}
	for name, c := range map[string]struct {
		change func(*world)
		stays  bool
	}{
		"while a rule and a pod select it": {func(*world) {}, true},
		"while one of two that claimed it does": {func(w *world) {
			delete(w.resources, "x")
		}, true},
		"not once nothing does": {func(w *world) {
			delete(w.resources, "z")
			w.resources["x"].spec.names = nil
		}, false},
		"nor where it is selected anew": {func(w *world) {
			delete(w.resources, "x")
			delete(w.resources, "z")
			w.narrow()
			w.add("y", 3, byRule)
		}, false},
		"nor where a foreign Secret is put in its way": {func(w *world) {
			w.foreign[k] = foreign{}
		}, false},
		"where the report of its pod was lost, by the rule": {func(w *world) {
			w.forgetDemand("node-a")
		}, true},
		"nor where the report of its pod was lost": {func(w *world) {
			delete(w.resources, "x")
			w.forgetDemand("node-a")
		}, false},
		"nor with its namespace": {func(w *world) {
			delete(w.namespaces, "a")
		}, false},
		"where its only resource is deleted and orphans it": {func(w *world) {
			delete(w.resources, "z")
			w.orphaned(w.resources["x"])
			delete(w.resources, "x")
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			w := smallWorld()
			x, z := w.add("x", 1, byRule), w.add("z", 2, byPod)
			w.keep[k] = &kept{uid: "u", reasons: map[string]bool{}}
			for _, r := range []*resource{x, z} {
				for reason := range w.reasons(r, w.namespaces["a"]) {
					w.keep[k].reasons[reason] = true
				}
			}
			c.change(w)
			w.narrow()
			require.Equal(t, c.stays, w.keep[k] != nil)
		})
	}
}
