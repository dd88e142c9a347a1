package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/imps-node/imps/test/cluster/cluster"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSimulation(t *testing.T) {
	c := config{
		Agents: 20, Namespaces: 30, Pods: 3, Waiting: 1, Resources: 2, Reports: 10, NewPods: 4, Restarts: 1, Batch: 7,
		Idle: time.Second, root: filepath.Join("..", ".."), quiet: 1700 * time.Millisecond,
	}
	require.NoError(t, c.validate())
	r, err := simulate(t.Context(), c, t.Output())
	require.NoError(t, err)
	require.Empty(t, r.Faults)

	phases := map[string]*phase{}
	for _, p := range r.Phases {
		phases[p.Name] = p
		require.NotZero(t, p.Usage.APIServer.ResidentBytes, p.Name)
		require.NotZero(t, p.Usage.Coordinator.ResidentBytes, p.Name)
	}
	require.Len(t, phases, 7)
	answered := func(p *phase, by user, verb, what string) int {
		sum := p.sum(by, verb, what)
		for _, n := range sum.Failed {
			sum.Requests -= n
		}
		return sum.Requests
	}
	secrets := c.Namespaces * c.Resources
	require.Equal(t, secrets, c.selected(), "every namespace has Pods")
	require.Equal(t, secrets, phases["the coordinator starts"].Changes[watch.Added]+phases["all agents start at once"].Changes[watch.Added])
	for _, name := range []string{"all agents start at once", "all agents restart, batch by batch"} {
		for _, what := range []string{"pods", "rendered Secrets", "node reports"} {
			require.Equal(t, c.Agents, answered(phases[name], agents, listAndWatch, what), "%s: watches of %s", name, what)
		}
		require.Equal(t, c.Agents, answered(phases[name], agents, "create", "selfsubjectreviews"), name)
		require.Positive(t, phases[name].Usage.Agents.ReceivedBytes)
	}
	require.Zero(t, phases["nothing happens"].sum(agents, "", "").Requests)
	require.Equal(t, map[watch.EventType]int{watch.Modified: secrets}, phases["the source is rotated"].Changes)
	require.Equal(t, c.NewPods*c.Resources, phases["new Pods in new namespaces"].sum(agents, "", "target Secrets").Created)
	restarts := phases["the coordinator is killed and starts, again and again"]
	require.Equal(t, c.Restarts, answered(restarts, coordinatorUser, listAndWatch, "namespaces"))
	require.Greater(t, restarts.Usage.Coordinator.ReceivedBytes, int64(10_000))

	weighed := map[string]int{}
	for _, size := range r.Sizes {
		require.NotZero(t, size.MeanBytes, size.What)
		weighed[size.What] = size.Objects
	}
	require.Equal(t, secrets+c.NewPods*c.Resources, weighed["target Secret"])
	require.Equal(t, c.Agents+c.Reports, weighed["node report"])
	require.Equal(t, c.Resources, weighed["rendered Secret"])

	var tables, encoded bytes.Buffer
	require.NoError(t, r.markdown(&tables))
	require.Contains(t, tables.String(), "| all agents start at once | agents | list and watch pods | 20 |")
	require.NoError(t, json.NewEncoder(&encoded).Encode(r))
	var decoded result
	require.NoError(t, json.Unmarshal(encoded.Bytes(), &decoded))
	require.Equal(t, r.Phases, decoded.Phases)
}

func TestNothingIsLeftOfARunThatIsBrokenOff(t *testing.T) {
	temporary := t.TempDir()
	t.Setenv("TMPDIR", temporary)
	ctx, cancel := context.WithCancel(t.Context())
	c := config{Agents: 3, Namespaces: 2, Pods: 1, Resources: 1, Batch: 1, Idle: time.Hour, root: filepath.Join("..", ".."), quiet: time.Second}
	// The agents' start is the second phase; what follows it waits an hour.
	_, err := simulate(ctx, c, writerFunc(func(line []byte) {
		if bytes.HasSuffix(line, []byte("nothing happens\n")) {
			cancel()
		}
	}))
	require.ErrorIs(t, err, context.Canceled)
	left, err := os.ReadDir(temporary)
	require.NoError(t, err)
	require.Empty(t, left)
	working, err := filepath.Glob("/proc/[0-9]*/cwd")
	require.NoError(t, err)
	for _, link := range working {
		cwd, err := os.Readlink(link)
		require.False(t, err == nil && strings.HasPrefix(cwd, temporary), "%s works in %s", link, cwd)
	}
}

type writerFunc func([]byte)

func (f writerFunc) Write(p []byte) (int, error) {
	f(p)
	return len(p), nil
}

func TestCount(t *testing.T) {
	t.Parallel()
	const agent, leader = "system:serviceaccount:imps-system:imps-node", "system:serviceaccount:imps-system:imps-coordinator"
	complete := func(user, verb, resource, namespace string, code int) cluster.Event {
		return cluster.Event{Stage: cluster.StageComplete, User: user, Verb: verb, Resource: resource, Namespace: namespace, Code: code}
	}
	begun := func(user, resource, uri string) cluster.Event {
		return cluster.Event{Stage: cluster.StageStarted, User: user, Verb: "watch", Resource: resource, URI: uri, Code: 200}
	}
	status := complete(leader, "patch", "imagepullsecrets", "", 200)
	status.Subresource = "status"
	tests := map[string]struct {
		events []cluster.Event
		want   []counted
	}{
		"nothing": {},
		"a watch counts when it begins, and not when it ends": {
			events: []cluster.Event{begun(agent, "pods", "/api/v1/pods?sendInitialEvents=true"), complete(agent, "watch", "pods", "", 200), begun(agent, "pods", "/api/v1/pods?resourceVersion=5")},
			want:   []counted{{request: request{agents, listAndWatch, "pods"}, Requests: 1}, {request: request{agents, watchOn, "pods"}, Requests: 1}},
		},
		"a watch that is refused counts, though it never begins": {
			events: []cluster.Event{complete(agent, "watch", "pods", "", 429)},
			want:   []counted{{request: request{agents, watchOn, "pods"}, Requests: 1, Failed: failures{429: 1}}},
		},
		"writes that created, changed nothing, or failed": {
			events: []cluster.Event{complete(agent, "patch", "secrets", "a", 201), complete(agent, "patch", "secrets", "b", 200), complete(agent, "patch", "secrets", "c", 409)},
			want:   []counted{{request: request{agents, "patch", "target Secrets"}, Requests: 3, Writes: 2, Created: 1, Failed: failures{409: 1}}},
		},
		"Secrets and ConfigMaps are told apart by what they are for": {
			events: []cluster.Event{
				complete(leader, "patch", "secrets", "imps-rendered", 200), complete(leader, "get", "secrets", "imps-system", 200),
				complete(leader, "get", "secrets", "registry-access", 200), complete(leader, "get", "secrets", "", 200), complete(leader, "list", "configmaps", "imps-system", 200), status,
			},
			want: []counted{
				{request: request{coordinatorUser, "patch", "imagepullsecrets/status"}, Requests: 1, Writes: 1},
				{request: request{coordinatorUser, "list", "node reports"}, Requests: 1},
				{request: request{coordinatorUser, "patch", "rendered Secrets"}, Requests: 1, Writes: 1},
				{request: request{coordinatorUser, "get", "source Secrets"}, Requests: 1},
				{request: request{coordinatorUser, "get", "state Secrets"}, Requests: 1},
				{request: request{coordinatorUser, "get", "target Secrets"}, Requests: 1},
			},
		},
		"a question that is a POST is no write, and what is not there no failure": {
			events: []cluster.Event{complete(agent, "create", "selfsubjectreviews", "", 201), complete(agent, "get", "secrets", "a", 404)},
			want:   []counted{{request: request{agents, "create", "selfsubjectreviews"}, Requests: 1}, {request: request{agents, "get", "target Secrets"}, Requests: 1}},
		},
		"others are not told apart": {
			events: []cluster.Event{complete("admin", "create", "pods", "a", 201), complete("system:apiserver", "get", "leases", "kube-system", 200)},
			want:   []counted{{request: request{other, "any", "anything"}, Requests: 2, Writes: 1, Created: 1}},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := &phase{}
			p.count(test.events)
			require.Equal(t, test.want, p.Counts)
		})
	}
}

func TestThePeakIsOfImpsAlone(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	var events []cluster.Event
	for i, user := range []string{"imps-node", "imps-coordinator", "imps-node", "default"} {
		events = append(events, cluster.Event{
			Stage: cluster.StageComplete, Verb: "get", Resource: "pods", Code: 200,
			User: "system:serviceaccount:imps-system:" + user, Received: noon.Add(time.Duration(i) * 400 * time.Millisecond),
		})
	}
	p := &phase{}
	p.count(events)
	require.Equal(t, 3, p.Peak)
}

func TestSizesThatCannotBe(t *testing.T) {
	t.Parallel()
	good := config{Agents: 2, Namespaces: 4, Pods: 3, Waiting: 1, Resources: 1, NewPods: 2, Batch: 1}
	require.NoError(t, good.validate())
	for name, change := range map[string]func(*config){
		"no agent":                            func(c *config) { c.Agents = 0 },
		"more Pods waiting than there are":    func(c *config) { c.Waiting = 4 },
		"more Pods of a node than namespaces": func(c *config) { c.Pods = 5 },
		"more new Pods than nodes":            func(c *config) { c.NewPods = 3 },
		"more agents than open files":         func(c *config) { c.Agents = 1 << 30 },
	} {
		c := good
		change(&c)
		require.Error(t, c.validate(), name)
	}
}

func TestHowManySecretsAreExpected(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		config       config
		first, later int
	}{
		"Pods reach every namespace":                        {config{Agents: 1000, Namespaces: 500, Pods: 10, Resources: 1}, 250, 500},
		"Pods reach some, and go round":                     {config{Agents: 2, Namespaces: 10, Pods: 2, Resources: 1}, 5, 7},
		"an odd number of namespaces":                       {config{Agents: 1, Namespaces: 5, Pods: 5, Resources: 1}, 3, 5},
		"each resource selects the same":                    {config{Agents: 2, Namespaces: 10, Pods: 2, Resources: 3}, 15, 21},
		"reports without an agent count from the beginning": {config{Agents: 1, Reports: 2, Namespaces: 10, Pods: 2, Resources: 1}, 7, 8},
	}
	for name, test := range tests {
		require.Equal(t, test.first, test.config.selectedAtFirst(), name)
		require.Equal(t, test.later, test.config.selected(), name)
	}
}
