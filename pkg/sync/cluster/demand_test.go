package cluster

import (
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	impsync "github.com/imps-node/imps/pkg/sync"
)

func newDemand() *demand {
	return &demand{byNode: map[string][]demandKey{}, states: map[demandKey]*demandState{}}
}

func always(demandKey) bool { return true }

// demandsFrom makes demands of "<namespace> <uid>" each.
func demandsFrom(demands ...string) []demandKey {
	var keys []demandKey
	for _, d := range demands {
		namespace, uid, _ := strings.Cut(d, " ")
		keys = append(keys, demandKey{namespace, types.UID(uid)})
	}
	slices.SortFunc(keys, demandKey.compare)
	return slices.Compact(keys)
}

func demandsOf(keys []demandKey) []string {
	var texts []string
	for _, key := range keys {
		texts = append(texts, key.namespace+" "+string(key.uid))
	}
	slices.Sort(texts)
	return texts
}

func TestDemandIsTheSumOfAllReports(t *testing.T) {
	t.Parallel()
	d := newDemand()
	at := func(minute int) time.Time { return noon.Add(time.Duration(minute) * time.Minute) }
	replace := func(minute int, node string, report []demandKey, changed ...string) {
		t.Helper()
		require.Equal(t, changed, demandsOf(d.replace(node, report, at(minute), always)))
	}
	nodes := func(key string) int {
		namespace, uid, _ := strings.Cut(key, " ")
		state := d.states[demandKey{namespace, types.UID(uid)}]
		if state == nil {
			return -1
		}
		return state.nodes
	}

	replace(0, "n1", demandsFrom("a u", "b u", "a v"), "a u", "a v", "b u")
	replace(1, "n2", demandsFrom("a u", "c u"), "c u")
	require.Equal(t, 2, nodes("a u"))
	require.Equal(t, 1, nodes("a v"))
	replace(2, "n1", demandsFrom("a u", "b u", "a v"))
	require.Equal(t, 2, nodes("a u"), "the same report again changes nothing")

	replace(3, "n1", demandsFrom("b u", "d u"), "a v", "d u")
	require.Equal(t, 1, nodes("a u"), "another node demands it still")
	require.Equal(t, 0, nodes("a v"))
	require.Equal(t, at(3), d.states[demandKey{"a", "v"}].ended)

	replace(4, "n2", nil, "a u", "c u")
	require.Equal(t, at(4), d.states[demandKey{"a", "u"}].ended)
	require.NotContains(t, d.byNode, "n2", "a report that is gone leaves nothing")
	replace(5, "n2", nil)
	replace(6, "n3", demandsFrom())
	require.NotContains(t, d.byNode, "n3")
	replace(7, "n3", demandsFrom("a u"), "a u")
	require.Equal(t, 1, nodes("a u"), "it begins again")

	d.forget(demandKey{"a", "u"})
	require.Equal(t, 1, nodes("a u"), "what is in force is not forgotten")
	d.forget(demandKey{"c", "u"})
	d.forget(demandKey{"unknown", "u"})
	require.Equal(t, -1, nodes("c u"))
	replace(8, "n1", demandsFrom("c u"), "b u", "c u", "d u")
	require.Equal(t, 1, nodes("c u"), "what was forgotten can begin again")
}

func TestAReportThatNamesADemandTwiceCountsOnce(t *testing.T) {
	t.Parallel()
	twice := reportOf(&corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "imps-node-n1"},
		Data:       map[string]string{impsync.ReportKey: `{"node":"n1","demand":{"b":["v"],"a":["v","u","v"]}}`},
	})
	require.NoError(t, twice.err)
	require.Equal(t, demandsFrom("a u", "a v", "b v"), twice.demand)
	d := newDemand()
	require.Len(t, d.replace("n1", demandsFrom("a u"), noon, always), 1)
	require.Equal(t, 1, d.states[demandKey{"a", "u"}].nodes)
	require.Len(t, d.replace("n1", nil, noon, always), 1)
	require.Equal(t, 0, d.states[demandKey{"a", "u"}].nodes)
}

func TestTheEndOfADemandIsRememberedOnlyWhereItMatters(t *testing.T) {
	t.Parallel()
	d := newDemand()
	d.replace("n1", demandsFrom("a u", "a v"), noon, always)
	changed := d.replace("n1", nil, noon, func(key demandKey) bool { return key.uid == "u" })
	require.Equal(t, []string{"a u", "a v"}, demandsOf(changed))
	require.Len(t, d.states, 1)
	require.Contains(t, d.states, demandKey{"a", "u"})
	require.Len(t, d.replace("n1", demandsFrom("a v"), noon, always), 1)
	require.Equal(t, 1, d.states[demandKey{"a", "v"}].nodes)
}

func TestADemandThatIsNotKnownYetCanLinger(t *testing.T) {
	t.Parallel()
	d := newDemand()
	key := demandKey{"a", "u"}
	require.Equal(t, &demandState{ended: noon, unknown: true}, d.linger(key, noon))
	require.Equal(t, []string{"a u"}, demandsOf(d.replace("n1", demandsFrom("a u"), noon, always)))
	require.Equal(t, &demandState{nodes: 1, ended: noon}, d.states[key], "now it is known")
}

// Whatever the reports say in whatever order, the counts are those of counting anew.
func TestDemandCountsAreAlwaysTheSum(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	d, reports := newDemand(), map[string][]demandKey{}
	for step := range 3_000 {
		node := string(rune('a' + random.IntN(5)))
		var report []demandKey
		if random.IntN(4) > 0 {
			var demands []string
			for range random.IntN(6) {
				demands = append(demands, string(rune('a'+random.IntN(3)))+" "+string(rune('u'+random.IntN(3))))
			}
			report = demandsFrom(demands...)
		}
		before := map[demandKey]bool{}
		for key, state := range d.states {
			before[key] = state.nodes > 0
		}
		changed := d.replace(node, report, noon.Add(time.Duration(step)*time.Second), always)
		reports[node] = report

		want := map[demandKey]int{}
		for _, r := range reports {
			for _, key := range r {
				want[key]++
			}
		}
		for key, state := range d.states {
			require.Equal(t, want[key], state.nodes)
			require.Equal(t, before[key] != (state.nodes > 0), slices.Contains(changed, key))
		}
		for key := range want {
			require.Contains(t, d.states, key)
		}
		if random.IntN(10) == 0 {
			d.forget(demandKey{string(rune('a' + random.IntN(3))), types.UID(rune('u' + random.IntN(3)))})
		}
	}
}

func TestReportsMakeTargetsWorthALook(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		term := newTestTerm(t)
		soon := func() []string {
			require.Empty(t, term.queuedTargets(), "the node is creating the Secret just then")
			<-time.After(demandDelay)
			synctest.Wait()
			return term.queuedTargets()
		}
		term.claimOf(t, resource(t, "a", 0, `{secret: {name: pull}, namespacesWithPods: {labels: [{}]}}`), 1)
		term.node("n1", false)
		key := types.NamespacedName{Namespace: "imps-system", Name: impsync.ReportName("n1")}
		put := func(demands ...string) *reportObject {
			return &reportObject{demand: demandsFrom(demands...)}
		}
		first, second := put("x uid-a", "y unknown"), put("z uid-a")
		broken := &reportObject{err: errors.New("node report: not valid JSON")}

		term.reportChanged(key, nil, first)
		require.Equal(t, []string{"x/pull"}, soon())
		term.reportChanged(key, first, second)
		require.Equal(t, []string{"x/pull", "z/pull"}, soon())
		term.reportChanged(key, second, broken)
		require.Empty(t, soon(), "a report that cannot be read changes nothing")
		require.Equal(t, 1, term.demand.states[demandKey{"z", "uid-a"}].nodes)
		term.reportChanged(key, broken, second)
		require.Empty(t, soon())
		require.Equal(t, 1, term.demand.states[demandKey{"z", "uid-a"}].nodes)
		term.reportChanged(key, second, nil)
		require.Equal(t, []string{"z/pull"}, soon())
		require.Equal(t, 0, term.demand.states[demandKey{"z", "uid-a"}].nodes)
		require.Empty(t, term.demand.byNode)
	})
}

// Else its Secrets would stay until another coordinator leads.
func TestTheDemandOfAReportEndsWithItEvenIfItCouldNotBeReadAtLast(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		term := newTestTerm(t)
		soon := func() []string {
			require.Empty(t, term.queuedTargets(), "the node is creating the Secret just then")
			<-time.After(demandDelay)
			synctest.Wait()
			return term.queuedTargets()
		}
		term.claimOf(t, resource(t, "a", 0, `{secret: {name: pull}, namespacesWithPods: {labels: [{}]}}`), 1)
		key := types.NamespacedName{Namespace: "imps-system", Name: impsync.ReportName("n1")}
		good := &reportObject{demand: demandsFrom("x uid-a")}
		broken := &reportObject{err: errors.New("node report: not valid JSON")}
		term.reportChanged(key, nil, good)
		term.reportChanged(key, good, broken)
		soon()
		term.reportChanged(key, broken, nil)
		require.Empty(t, term.demand.byNode)
		require.Equal(t, []string{"x/pull"}, soon())
	})
}

func TestTheReportOfANodeThatIsGoneIsDroppedLater(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		term := newTestTerm(t)
		term.node("n1", true)
		here, gone := types.NamespacedName{Name: "n1"}, types.NamespacedName{Name: "n2"}
		dropped := func() []string { return drain(term.reportQueue, func(s string) string { return s }) }
		term.nodeChanged(here, nil, &struct{}{})
		term.nodeChanged(gone, &struct{}{}, nil)
		term.nodeChanged(gone, &struct{}{}, &struct{}{})
		<-time.After(DefaultReportLinger - time.Second)
		require.Empty(t, dropped())
		<-time.After(2 * time.Second)
		synctest.Wait()
		require.Equal(t, []string{"n2"}, dropped())
		require.NoError(t, term.dropReport(t.Context(), "n2"), "it has none")
		require.NoError(t, term.dropReport(t.Context(), "n1"), "it is there")
		require.Empty(t, term.server().asked())
		require.Empty(t, term.nodeGone)
	})
}

func TestTheReportOfANodeThatWasBackInBetweenStaysLonger(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		term := newTestTerm(t)
		key := types.NamespacedName{Name: "n1"}
		term.node("n1", true)
		goes := func() {
			term.nodes.Drop(key, func(struct{}) bool { return true })
			term.nodeChanged(key, &struct{}{}, nil)
		}
		drop := func() {
			t.Helper()
			synctest.Wait()
			require.Equal(t, []string{"n1"}, drain(term.reportQueue, func(s string) string { return s }))
			err := term.dropReport(t.Context(), "n1")
			require.Equal(t, len(term.server().asked()) == 0, err == nil)
		}
		goes()
		<-time.After(DefaultReportLinger / 2)
		term.node("n1", true)
		term.nodeChanged(key, nil, &struct{}{})
		<-time.After(DefaultReportLinger / 4)
		goes()
		<-time.After(DefaultReportLinger / 4)
		drop()
		require.Contains(t, term.nodeGone, "n1", "not yet")
		<-time.After(DefaultReportLinger/4*3 - 1)
		synctest.Wait()
		require.Zero(t, term.reportQueue.Len())
		<-time.After(1)
		synctest.Wait()
		require.Equal(t, []string{"n1"}, drain(term.reportQueue, func(s string) string { return s }))
		require.Error(t, term.dropReport(t.Context(), "n1"), "now it is deleted, and the server is away")
		require.Equal(t, []string{"DELETE /api/v1/namespaces/imps-system/configmaps/imps-node-n1"}, term.server().asked())
	})
}

func TestBeforeTheFirstListsAreInNothingIsConcludedFromThem(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		term := newTestTerm(t)
		term.started = false
		term.nodeChanged(types.NamespacedName{Name: "n1"}, &struct{}{}, nil)
		term.namespaceChanged(types.NamespacedName{Name: "n1"}, nil, &namespaceMeta{})
		term.renderedChanged(types.NamespacedName{Name: impsync.RenderedName("u")}, nil, &renderedSecret{})
		<-time.After(time.Hour)
		require.Zero(t, term.reportQueue.Len())
		require.Empty(t, term.queuedTargets())
		require.Empty(t, term.queuedResources())
	})
}

func TestNodesWithoutAgentAreCountedAndTold(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		term := newTestTerm(t)
		for _, name := range []string{"n1", "n2", "n3"} {
			term.node(name, name != "n2")
		}
		term.reports.Put(types.NamespacedName{Namespace: "imps-system", Name: impsync.ReportName("gone")}, reportObject{})
		require.Equal(t, 1, term.countNodes().withoutAgent)
		require.Equal(t, 3, term.countNodes().all)

		term.claimOf(t, resource(t, "pods", 0, `{secret: {name: pull}, namespacesWithPods: {labels: [{}]}}`), 1)
		term.claimOf(t, resource(t, "names", 0, `{secret: {name: pull}, namespaces: {names: [x]}}`), 1)
		term.claims["uid-unrendered"] = &claim{}
		term.updateNodesWithoutAgent()
		<-time.After(2 * statusDelay)
		synctest.Wait()
		require.Equal(t, []string{"uid-pods"}, term.queuedStatuses(), "only their status says it")
	})
}

func TestANodeWhoseReportCannotBeReadIsNotTakenForOneWithoutDemand(t *testing.T) {
	inBubble(t, func(t *testing.T, s *situation) {
		c := s.claimOf(t, resource(t, "a", 0, byPods), 7)
		s.there(c)
		s.node("n1", false)
		key := types.NamespacedName{Namespace: "imps-system", Name: impsync.ReportName("n1")}
		broken := reportObject{err: errors.New("x")}
		s.reports.Put(key, broken)
		s.reportChanged(key, nil, &broken)
		s.updateNodesWithoutAgent()
		require.Zero(t, s.decides())
		require.Zero(t, s.decide(s.key, s.now.Add(DefaultDemandLinger)))
	})
}

func TestARenderedSecretIsWrittenInTheNewestVersionThatEveryAgentReads(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		ours    []int
		reports [][]int
		current int
		want    int
	}{
		"no agent yet: the newest":                        {ours: []int{1, 2}, want: 2},
		"all read the newest":                             {ours: []int{1, 2}, reports: [][]int{{1, 2}, {2, 3}}, current: 1, want: 2},
		"one reads an older one only":                     {ours: []int{1, 2}, reports: [][]int{{1, 2}, {1}}, current: 1, want: 1},
		"an agent is rolled back: down again":             {ours: []int{1, 2}, reports: [][]int{{1, 2}, {1}}, current: 2, want: 1},
		"the coordinator is rolled back, its own newest":  {ours: []int{1}, reports: [][]int{{1, 2}}, want: 1},
		"nothing that all read: it stays as it is":        {ours: []int{2, 3}, reports: [][]int{{1}, {3}}, current: 3, want: 3},
		"nothing that all read, and nothing is there yet": {ours: []int{2, 3}, reports: [][]int{{1}}, want: 2},
		"a report that names none":                        {ours: []int{1, 2}, reports: [][]int{nil, {1, 2}}, current: 1, want: 1},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				term := newTestTerm(t)
				term.config.FormatVersions = test.ours
				for i, formats := range test.reports {
					key := types.NamespacedName{Namespace: "imps-system", Name: impsync.ReportName(string(rune('a' + i)))}
					term.reportChanged(key, nil, &reportObject{formats: formats})
				}
				require.Equal(t, test.want, term.formatVersion(test.current))
			})
		})
	}
}

func TestResourcesAreLookedAtWhereTheVersionMayChange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		term := newTestTerm(t)
		term.config.FormatVersions = []int{1, 2}
		term.claimOf(t, resource(t, "a", 0, byName), 1)
		last := map[string]*reportObject{}
		says := func(node string, current *reportObject, queued ...string) {
			t.Helper()
			term.reportChanged(types.NamespacedName{Namespace: "imps-system", Name: impsync.ReportName(node)}, last[node], current)
			last[node] = current
			require.Equal(t, queued, term.queuedResources())
		}
		old, current := &reportObject{formats: []int{1}}, &reportObject{formats: []int{1, 2}}
		says("n1", current)
		says("n2", old, "uid-a")
		says("n3", old)
		says("n2", current)
		says("n3", &reportObject{err: errors.New("node report: not valid JSON")})
		require.Equal(t, 1, term.formatVersion(1), "what was readable last stays in force")
		says("n3", nil, "uid-a")
	})
}

// What nothing demands any more is deleted only where no report says otherwise.
func TestTheReportsAreAskedForWhatNoWatchHasTold(t *testing.T) {
	t.Parallel()
	unreadable := func(list corev1.ConfigMapList) corev1.ConfigMapList {
		list.Items[0].Name = impsync.ReportName("n2")
		return list
	}
	for name, test := range map[string]struct {
		watched   []string
		reports   func(t *testing.T) corev1.ConfigMapList
		namespace string
		behind    bool
	}{
		"a demand that no watch has told of":  {nil, func(t *testing.T) corev1.ConfigMapList { return reports(t, "uid-b") }, "n", true},
		"one that has ended, as a watch says": {[]string{"n uid-b", ""}, func(t *testing.T) corev1.ConfigMapList { return reports(t, "uid-b") }, "n", true},
		"one that is known":                   {[]string{"n uid-b"}, func(t *testing.T) corev1.ConfigMapList { return reports(t, "uid-b") }, "n", false},
		"one of two that is known":            {[]string{"n uid-b"}, func(t *testing.T) corev1.ConfigMapList { return reports(t, "uid-a", "uid-b") }, "n", true},
		"one in another namespace":            {nil, func(t *testing.T) corev1.ConfigMapList { return reports(t, "uid-b") }, "m", false},
		"none":                                {nil, func(t *testing.T) corev1.ConfigMapList { return reports(t) }, "n", false},
		"a report that cannot be read":        {nil, func(t *testing.T) corev1.ConfigMapList { return unreadable(reports(t, "uid-b")) }, "n", false},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, s *situation) {
				for _, demands := range test.watched {
					s.demand.replace("n1", demandsFrom(demands), s.now, always)
				}
				require.Error(t, s.confirmUndemanded(t.Context(), test.namespace), "nobody answers")
				s.server().answers = map[string]any{listOfReports: test.reports(t)}
				err := s.confirmUndemanded(t.Context(), test.namespace)
				if test.behind {
					require.ErrorIs(t, err, errBehind)
				} else {
					require.NoError(t, err)
				}
			})
		})
	}
}
