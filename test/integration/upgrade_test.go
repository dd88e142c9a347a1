package integration

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	impsync "github.com/imps-node/imps/pkg/sync"
	clusterduty "github.com/imps-node/imps/pkg/sync/cluster"
	nodeduty "github.com/imps-node/imps/pkg/sync/node"
	"github.com/imps-node/imps/test/cluster/cluster"
)

// release is what the duties of one release of imps read and write.
type release []int

var before, after = release{1}, release{1, 2}

func (r release) coordinator(c *clusterduty.Config) { c.FormatVersions = r }
func (r release) agent(c *nodeduty.Config)          { c.FormatVersions = r }

// upgrade is a cluster whose imps goes from one release to another: one coordinator and
// an agent on each of two nodes, with a Secret for each of two Pods and one for a label.
type upgrade struct {
	*system
	uid        types.UID
	nodes      []string
	agents     []*process
	namespaces []string
	secrets    map[string]types.UID
	mark       cluster.Mark
}

func newUpgrade(t *testing.T, from release) *upgrade {
	t.Helper()
	u := &upgrade{system: newSystem(t), secrets: map[string]types.UID{}}
	u.source("one", dockerConfig("one.example.com"))
	r := u.resource(u.prefix+"r", `
registry: {credentials: [{name: one, namespace: registry-access}]}
target:
  secret: {name: `+secretName+`}
  namespaces: {labels: [{matchLabels: {upgrade: "`+u.prefix+`"}}]}
  namespacesWithPods: {labels: [{matchLabels: {app: web}}]}`)
	u.uid = r.UID
	u.coordinator(from.coordinator)
	u.namespaces = append(u.namespaces, u.namespace(map[string]string{"upgrade": u.prefix}, nil))
	for i := range 2 {
		node := fmt.Sprintf("%snode-%d", u.prefix, i)
		u.nodes, u.agents = append(u.nodes, node), append(u.agents, u.agent(node, from.agent))
		namespace := u.namespace(nil, nil)
		u.pod(namespace, node, map[string]string{"app": "web"}, nil)
		u.namespaces = append(u.namespaces, namespace)
	}
	for _, namespace := range u.namespaces {
		u.secrets[namespace] = u.has(namespace, "one.example.com").UID
	}
	for _, namespace := range u.namespaces[1:] {
		u.demanded(namespace) // which is up to a second after the Secret
	}
	u.ready(r.Name, 3)
	u.written(from[len(from)-1])
	u.mark = u.control.Audit().Mark()
	return u
}

// written waits until the rendered Secret is of a version.
func (u *upgrade) written(version int) {
	u.t.Helper()
	u.eventually(func() error {
		if got := u.version(); got != fmt.Sprint(version) {
			return fmt.Errorf("it is of version %q", got)
		}
		return nil
	}, "the rendered Secret does not become one of version %d", version)
}

func (u *upgrade) version() string {
	u.t.Helper()
	return string(u.secret(renderedNamespace, impsync.RenderedName(u.uid)).Data["formatVersion"])
}

func (u *upgrade) replaceCoordinator(with release) {
	u.t.Helper()
	u.running.stop()
	u.coordinator(with.coordinator)
}

func (u *upgrade) replaceAgent(i int, with release) {
	u.t.Helper()
	u.agents[i].stop()
	u.agents[i] = u.agent(u.nodes[i], with.agent)
}

// kept asserts that nothing was lost, that every Secret is the one it was and was written
// so many times, the rendered one once more at most, and that the agents create Secrets by
// the form that is there now.
func (u *upgrade) kept(writes int, registry string) {
	u.t.Helper()
	u.ready(u.prefix+"r", len(u.namespaces))
	// Longer than what no Pod demands any more would stay.
	require.Never(u.t, func() bool {
		for namespace, uid := range u.secrets {
			if secret := u.secret(namespace, secretName); secret == nil || secret.UID != uid {
				return true
			}
		}
		return false
	}, 2*linger, 50*time.Millisecond)
	counts := map[string]int{}
	for _, e := range u.secretWrites(u.mark, "") {
		counts[e.Namespace]++
	}
	for _, namespace := range u.namespaces {
		require.Equal(u.t, writes, counts[namespace], "writes of the Secret in %s", namespace)
	}
	rendered := 0
	for _, e := range u.requests(u.mark, "coordinator") {
		if e.Resource == "secrets" && e.Namespace == renderedNamespace && e.Code < 300 && e.Verb == "patch" {
			rendered++
		}
	}
	require.Positive(u.t, rendered)
	require.LessOrEqual(u.t, rendered, writes+1)
	u.running.stop() // the agents do it alone
	for _, node := range u.nodes {
		namespace := u.namespace(nil, nil)
		u.pod(namespace, node, map[string]string{"app": "web"}, nil)
		u.has(namespace, registry)
	}
}

func TestAnUpgradeOfTheAgentsFirstRaisesTheFormatVersionLast(t *testing.T) {
	u := newUpgrade(t, before)
	u.replaceAgent(0, after)
	u.replaceAgent(1, after)
	require.Equal(t, "1", u.version())
	u.replaceCoordinator(after)
	u.written(2)
	u.kept(0, "one.example.com")
}

func TestAnUpgradeOfTheCoordinatorFirstWaitsForTheLastAgent(t *testing.T) {
	u := newUpgrade(t, before)
	u.replaceCoordinator(after)
	u.replaceAgent(0, after)
	u.awaitFormats(u.nodes[0], after)
	u.source("one", dockerConfig("two.example.com"))
	for _, namespace := range u.namespaces {
		u.has(namespace, "two.example.com")
	}
	require.Equal(t, "1", u.version(), "it is written after the report, and for the agent that is still old")
	u.replaceAgent(1, after)
	u.written(2)
	u.kept(1, "two.example.com")
}

func TestARollbackOfTheAgentsFirstLowersTheFormatVersionAtOnce(t *testing.T) {
	u := newUpgrade(t, after)
	u.replaceAgent(0, before)
	u.written(1)
	u.replaceAgent(1, before)
	u.replaceCoordinator(before)
	require.Equal(t, "1", u.version())
	u.kept(0, "one.example.com")
}

// What the newer coordinator rendered is nothing that the older one can compare with: it
// renders anew, with a counter beyond all that are there.
func TestARollbackOfTheCoordinatorFirstWritesEverySecretOnce(t *testing.T) {
	u := newUpgrade(t, after)
	u.replaceCoordinator(before)
	u.written(1)
	u.replaceAgent(0, before)
	u.replaceAgent(1, before)
	u.kept(1, "one.example.com")
}

// While the coordinator is away, an agent that cannot read the rendered form withdraws no
// demand: else its Secrets would go as soon as the coordinator is back.
func TestAnAgentThatIsRolledBackWithoutACoordinatorKeepsItsDemand(t *testing.T) {
	u := newUpgrade(t, after)
	u.running.stop()
	u.replaceAgent(0, before)
	u.awaitFormats(u.nodes[0], before)
	u.demanded(u.namespaces[1])
	u.coordinator(after.coordinator)
	u.written(1)
	u.kept(0, "one.example.com")
}

// awaitFormats waits until the report of a node names the versions of a release.
func (u *upgrade) awaitFormats(node string, r release) {
	u.t.Helper()
	u.eventually(func() error {
		report, err := u.core.CoreV1().ConfigMaps(systemNamespace).Get(u.t.Context(), impsync.ReportName(node), metav1.GetOptions{})
		if err != nil {
			return err
		}
		decoded, err := impsync.DecodeReport(report.Data)
		if err == nil && len(decoded.FormatVersions) != len(r) {
			err = fmt.Errorf("it names %v", decoded.FormatVersions)
		}
		return err
	}, "the report of %s does not name %v", node, r)
}
