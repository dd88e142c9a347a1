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
	"k8s.io/apimachinery/pkg/types"

	impsync "github.com/imps-node/imps/pkg/sync"
)

func newDemand() *demand {
	return &demand{byNode: map[string]map[demandKey]struct{}{}, states: map[demandKey]*demandState{}}
}

func always(demandKey) bool { return true }

// reportOfDemands makes a report of "<namespace> <uid>" each.
func reportOfDemands(node string, demands ...string) *impsync.Report {
	r := &impsync.Report{Node: node, Demand: map[string][]types.UID{}}
	for _, d := range demands {
		namespace, uid, _ := strings.Cut(d, " ")
		r.Demand[namespace] = append(r.Demand[namespace], types.UID(uid))
	}
	return r
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
	replace := func(minute int, node string, report *impsync.Report, changed ...string) {
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

	replace(0, "n1", reportOfDemands("n1", "a u", "b u", "a v"), "a u", "a v", "b u")
	replace(1, "n2", reportOfDemands("n2", "a u", "c u"), "c u")
	require.Equal(t, 2, nodes("a u"))
	require.Equal(t, 1, nodes("a v"))
	replace(2, "n1", reportOfDemands("n1", "a u", "b u", "a v"))
	require.Equal(t, 2, nodes("a u"), "the same report again changes nothing")

	replace(3, "n1", reportOfDemands("n1", "b u", "d u"), "a v", "d u")
	require.Equal(t, 1, nodes("a u"), "another node demands it still")
	require.Equal(t, 0, nodes("a v"))
	require.Equal(t, at(3), d.states[demandKey{"a", "v"}].ended)

	replace(4, "n2", nil, "a u", "c u")
	require.Equal(t, at(4), d.states[demandKey{"a", "u"}].ended)
	require.NotContains(t, d.byNode, "n2", "a report that is gone leaves nothing")
	replace(5, "n2", nil)
	replace(6, "n3", reportOfDemands("n3"))
	require.NotContains(t, d.byNode, "n3")
	replace(7, "n3", reportOfDemands("n3", "a u"), "a u")
	require.Equal(t, 1, nodes("a u"), "it begins again")

	d.forget(demandKey{"a", "u"})
	require.Equal(t, 1, nodes("a u"), "what is in force is not forgotten")
	d.forget(demandKey{"c", "u"})
	d.forget(demandKey{"unknown", "u"})
	require.Equal(t, -1, nodes("c u"))
	replace(8, "n1", reportOfDemands("n1", "c u"), "b u", "c u", "d u")
	require.Equal(t, 1, nodes("c u"), "what was forgotten can begin again")
}

func TestAReportThatNamesADemandTwiceCountsOnce(t *testing.T) {
	t.Parallel()
	d := newDemand()
	require.Len(t, d.replace("n1", reportOfDemands("n1", "a u", "a u"), noon, always), 1)
	require.Equal(t, 1, d.states[demandKey{"a", "u"}].nodes)
	require.Len(t, d.replace("n1", nil, noon, always), 1)
	require.Equal(t, 0, d.states[demandKey{"a", "u"}].nodes)
}

func TestTheEndOfADemandIsRememberedOnlyWhereItMatters(t *testing.T) {
	t.Parallel()
	d := newDemand()
	d.replace("n1", reportOfDemands("n1", "a u", "a v"), noon, always)
	changed := d.replace("n1", nil, noon, func(key demandKey) bool { return key.uid == "u" })
	require.Equal(t, []string{"a u", "a v"}, demandsOf(changed))
	require.Len(t, d.states, 1)
	require.Contains(t, d.states, demandKey{"a", "u"})
	require.Len(t, d.replace("n1", reportOfDemands("n1", "a v"), noon, always), 1)
	require.Equal(t, 1, d.states[demandKey{"a", "v"}].nodes)
}

func TestADemandThatIsNotKnownYetCanLinger(t *testing.T) {
	t.Parallel()
	d := newDemand()
	key := demandKey{"a", "u"}
	require.Equal(t, &demandState{ended: noon, unknown: true}, d.linger(key, noon))
	require.Equal(t, []string{"a u"}, demandsOf(d.replace("n1", reportOfDemands("n1", "a u"), noon, always)))
	require.Equal(t, &demandState{nodes: 1, ended: noon}, d.states[key], "now it is known")
}

// Whatever the reports say in whatever order, the counts are those of counting anew.
func TestDemandCountsAreAlwaysTheSum(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	d, reports := newDemand(), map[string]*impsync.Report{}
	for step := range 3_000 {
		node := string(rune('a' + random.IntN(5)))
		var report *impsync.Report
		if random.IntN(4) > 0 {
			var demands []string
			for range random.IntN(6) {
				demands = append(demands, string(rune('a'+random.IntN(3)))+" "+string(rune('u'+random.IntN(3))))
			}
			report = reportOfDemands(node, demands...)
		}
		before := map[demandKey]bool{}
		for key, state := range d.states {
			before[key] = state.nodes > 0
		}
		changed := d.replace(node, report, noon.Add(time.Duration(step)*time.Second), always)
		reports[node] = report

		want := map[demandKey]int{}
		for _, r := range reports {
			if r == nil {
				continue
			}
			for namespace, uids := range r.Demand {
				for _, uid := range slices.Compact(slices.Sorted(slices.Values(uids))) {
					want[demandKey{namespace, uid}]++
				}
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
			return &reportObject{report: *reportOfDemands("n1", demands...)}
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
		good := &reportObject{report: *reportOfDemands("n1", "x uid-a")}
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
		without, all := term.nodesWithoutAgent()
		require.Equal(t, 1, without)
		require.Equal(t, 3, all)

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
