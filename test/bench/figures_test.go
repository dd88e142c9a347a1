package main

import (
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

func TestPercentileIsOneOfTheValues(t *testing.T) {
	t.Parallel()
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(i + 1)
	}
	for name, tt := range map[string]struct {
		sorted []float64
		p      float64
		want   float64
	}{
		"no value":                             {nil, 50, 0},
		"one value is every percentile":        {[]float64{7}, 99, 7},
		"the median of two is the first":       {[]float64{1, 2}, 50, 1},
		"the median of three is the second":    {[]float64{1, 2, 3}, 50, 2},
		"99 of 100":                            {hundred, 99, 99},
		"90 of 100":                            {hundred, 90, 90},
		"of few values, 99 is the greatest":    {[]float64{1, 2, 3}, 99, 3},
		"100 is the greatest of all":           {hundred, 100, 100},
		"values below zero are as good as any": {[]float64{-3, -2, 5}, 50, -2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			require.InDelta(t, tt.want, percentile(tt.sorted, tt.p), 0)
		})
	}
}

func TestLatencyIsInMilliseconds(t *testing.T) {
	t.Parallel()
	got := latencyOf([]time.Duration{3 * time.Millisecond, 500 * time.Microsecond, 2 * time.Second})
	require.Equal(t, latency{Samples: 3, P50: 3, P90: 2000, P99: 2000, Max: 2000}, got)
}

func TestMedianIsOverRuns(t *testing.T) {
	t.Parallel()
	runs := []sizeRun{{Load: 9}, {Load: 1}, {Load: 4}}
	of := func(r sizeRun) float64 { return r.Load }
	require.InDelta(t, 4, median(runs, of), 0)
	require.InDelta(t, 5, median(runs[:2], of), 0)
}

func TestAccountTellsRequestsApart(t *testing.T) {
	t.Parallel()
	const coordinatorUser, agentUser = "system:serviceaccount:imps-system:imps-coordinator", "system:serviceaccount:imps-system:imps-node"
	request := func(user, verb, resource, name string, code int) cluster.Event {
		return cluster.Event{Stage: cluster.StageComplete, User: user, Verb: verb, Resource: resource, Name: name, Code: code}
	}
	started := request(agentUser, "watch", "namespaces", "", http.StatusOK)
	started.Stage = cluster.StageStarted
	review := request(agentUser, "create", "selfsubjectreviews", "", http.StatusCreated)
	review.Group = "authentication.k8s.io"
	for name, tt := range map[string]struct {
		event cluster.Event
		want  func(*account)
	}{
		"a write of a pull Secret": {request(agentUser, "patch", "secrets", imps.SecretName, http.StatusCreated), func(a *account) {
			a.SecretWrites[agents]++
			a.Requests[agents]++
		}},
		"one that met a conflict": {request(coordinatorUser, "patch", "secrets", imps.SecretName, http.StatusConflict), func(a *account) {
			a.Conflicts++
			a.Requests[coordinator]++
		}},
		"a deletion of what is gone": {request("system:serviceaccount:kube-system:generic-garbage-collector", "delete", "secrets", imps.SecretName, http.StatusNotFound), func(a *account) {
			a.NotFound++
			a.Requests[collector]++
		}},
		"one that is forbidden": {request(agentUser, "patch", "secrets", imps.SecretName, http.StatusForbidden), func(a *account) {
			a.Refused++
			a.Requests[agents]++
		}},
		"reading what is not there is no write": {request(agentUser, "get", "secrets", imps.SecretName, http.StatusNotFound), func(a *account) {
			a.Reads["agents: get secrets"]++
			a.Requests[agents]++
		}},
		"a write of another Secret": {request(coordinatorUser, "patch", "secrets", "imps-rendered-1", http.StatusOK), func(a *account) {
			a.OtherWrites["coordinator: patch secrets"]++
			a.Requests[coordinator]++
		}},
		"a watch counts when it begins":   {started, func(a *account) { a.Reads["agents: watch namespaces"]++; a.Requests[agents]++ }},
		"and not when it ends":            {request(agentUser, "watch", "namespaces", "", http.StatusOK), func(*account) {}},
		"but when it is refused":          {request(agentUser, "watch", "namespaces", "", http.StatusForbidden), func(a *account) { a.Reads["agents: watch namespaces"]++; a.Requests[agents]++ }},
		"a review is stored nowhere":      {review, func(a *account) { a.Reads["agents: create selfsubjectreviews"]++; a.Requests[agents]++ }},
		"what the bench does":             {request("admin", "patch", "secrets", imps.SecretName, http.StatusCreated), func(*account) {}},
		"what has nothing to do with it":  {request("system:apiserver", "update", "leases", "", http.StatusOK), func(a *account) { a.Requests[others]++ }},
		"what other controllers write to": {request("system:node:a", "patch", "secrets", imps.SecretName, http.StatusOK), func(a *account) { a.SecretWrites[others]++; a.Requests[others]++ }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			want, got := newAccount(), newAccount()
			tt.want(&want)
			got.add(tt.event)
			require.Equal(t, want, got)
		})
	}
}

func TestGoalIsJudgedByTheMedian(t *testing.T) {
	t.Parallel()
	run := func(p99 float64) sizeRun {
		return sizeRun{Size: "small", Phases: []phase{{Name: phasePods, Latency: latency{P99: p99}}}}
	}
	find := func(runs ...sizeRun) goal {
		for _, g := range goalsOf(runs) {
			if g.Name == "Pod bound → Secret, p99" {
				return g
			}
		}
		require.Fail(t, "no such goal")
		return goal{}
	}
	limit := 40.0
	require.Equal(t, goal{Size: "small", Name: "Pod bound → Secret, p99", Unit: "ms", Before: "15 s", Limit: &limit, Seen: 30, Least: 20, Most: 90, Met: true},
		find(run(90), run(20), run(30)))
	require.False(t, find(run(41)).Met)
}

func TestFiguresHaveThreeDigits(t *testing.T) {
	t.Parallel()
	for value, want := range map[float64]string{0: "0", 3: "3", 1200: "1200", 0.258: "0.26", 9.876: "9.88", 12.34: "12.3", 123.4: "123", 12345.6: "12,346", -0.31: "-0.31"} {
		require.Equal(t, want, figure(value))
	}
}

func TestParseRefusesWhatMakesNoSense(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"a size that is not there": {"--sizes=tiny"},
		"an argument":              {"small"},
		"no run":                   {"--repeats=0"},
		"no question":              {"--answers=0"},
		"no rate":                  {"--rate=0"},
		"time before now":          {"--idle=-1s"},
		"fewer than no namespaces": {"--namespaces=-1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := parse(args, io.Discard)
			require.Error(t, err)
		})
	}
	s, err := parse(nil, io.Discard)
	require.NoError(t, err)
	require.Equal(t, []string{"small", "large", sizeProvider, sizeKubelet}, s.sizes)
}
