package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	nodeduty "github.com/imps-node/imps/pkg/sync/node"
	"github.com/imps-node/imps/test/imps"
)

// provider is the built imps-credprovider, and the cache that it answers from.
type provider struct{ binary, cache string }

// provider builds the provider, and returns what has an agent write its cache.
func (s *system) provider() (p provider, withCache func(*nodeduty.Config)) {
	s.t.Helper()
	binary, err := imps.BuildCommand(s.t.Context(), filepath.Join("..", ".."), s.t.TempDir(), "imps-credprovider")
	require.NoError(s.t, err)
	p = provider{binary: binary, cache: filepath.Join(s.t.TempDir(), "imps")}
	return p, func(c *nodeduty.Config) { c.CacheDir = p.cache }
}

// asks returns the keys that the provider has credentials for, as a kubelet asks it; the token may be empty.
func (p provider) asks(t *testing.T, image, token string) map[string]string {
	t.Helper()
	request, err := json.Marshal(map[string]string{
		"apiVersion": "credentialprovider.kubelet.k8s.io/v1", "kind": "CredentialProviderRequest", "image": image, "serviceAccountToken": token,
	})
	require.NoError(t, err)
	command := exec.CommandContext(t.Context(), p.binary, "--cache-dir="+p.cache)
	command.Stdin = strings.NewReader(string(request))
	out, err := command.Output()
	require.NoError(t, err)
	var answer struct {
		Auth map[string]struct{ Username, Password string }
	}
	require.NoError(t, json.Unmarshal(out, &answer))
	keys := map[string]string{}
	for key, auth := range answer.Auth {
		keys[key] = auth.Password
	}
	return keys
}

// tokenFor is what the kubelet gets for a Pod of a ServiceAccount.
func (s *system) tokenFor(namespace, account, audience string) string {
	s.t.Helper()
	request, err := s.core.CoreV1().ServiceAccounts(namespace).CreateToken(s.t.Context(), account,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{audience}}}, metav1.CreateOptions{})
	require.NoError(s.t, err)
	return request.Status.Token
}

// Each Pod may pull what its namespace is selected for, and nothing else: 10 namespaces, 10 ServiceAccounts in each, and 10
// registries, with real tokens.
func TestPodsMayPullWhatTheirNamespaceIsSelectedFor(t *testing.T) {
	const n = 10
	s := newSystem(t)
	p, withCache := s.provider()
	s.coordinator()
	s.agent("node-a", withCache)
	may := func(namespace, registry int) bool { return (3*namespace+registry)%4 < 2 }
	var namespaces []string
	for i := range n {
		namespace := s.namespace(map[string]string{fmt.Sprint(s.prefix, "-odd"): fmt.Sprint(i % 2)}, nil)
		namespaces = append(namespaces, namespace)
		for a := range n {
			_, err := s.core.CoreV1().ServiceAccounts(namespace).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("sa-", a)}}, metav1.CreateOptions{})
			if !apierrors.IsAlreadyExists(err) {
				require.NoError(t, err)
			}
		}
		s.pod(namespace, "node-a", nil, nil)
	}
	for r := range n {
		source := fmt.Sprint("registry-", r)
		s.source(source, dockerConfig(fmt.Sprintf("registry-%d.example", r)))
		var selected []string
		for i := range n {
			if may(i, r) {
				selected = append(selected, namespaces[i])
			}
		}
		s.resource(fmt.Sprint(s.prefix, "-", r), `
target:
  secret: {name: `+secretName+`}
  namespaces: {names: [`+strings.Join(selected, ", ")+`]}
  kubelet: {}
registry: {credentials: [{name: `+source+`, namespace: registry-access}]}`)
	}
	image := func(r int) string { return fmt.Sprintf("registry-%d.example/app", r) }
	for i := range n { // until all is rendered, and has arrived on the node
		s.eventually(func() error {
			token := s.tokenFor(namespaces[i], "sa-0", "imps")
			for r := range n {
				if may(i, r) && len(p.asks(t, image(r), token)) == 0 {
					return fmt.Errorf("nothing for %s in %s", image(r), namespaces[i])
				}
			}
			return nil
		}, "a record has not arrived")
	}
	cells := 0
	for i, namespace := range namespaces {
		for a := range n {
			token := s.tokenFor(namespace, fmt.Sprint("sa-", a), "imps")
			for r := range n {
				want := map[string]string{}
				if may(i, r) {
					want[fmt.Sprintf("registry-%d.example", r)] = canaryPassword
				}
				require.Equal(t, want, p.asks(t, image(r), token), "%s in %s", image(r), namespace)
				cells++
			}
		}
	}
	require.Equal(t, n*n*n, cells)
	require.Empty(t, p.asks(t, image(0), ""), "no resource is for the node")
	require.Empty(t, p.asks(t, image(0), s.tokenFor(namespaces[0], "sa-0", "another")))
	require.Empty(t, p.asks(t, image(0), s.tokenFor("default", "default", "imps")), "it has no Pod here")
}

// A resource for nodes serves every Pod of the node, and no other scope; what changes arrives, also while the coordinator is away.
func TestTheNodesRecordsFollow(t *testing.T) {
	s := newSystem(t)
	p, withCache := s.provider()
	coordinator := s.coordinator()
	agent := s.agent("node-a", withCache)
	s.source("hub", dockerConfig("registry.one"))
	s.source("other", dockerConfig("registry.two"))
	namespace := s.namespace(nil, nil)
	pod := s.pod(namespace, "node-a", nil, nil)
	serve := func(scope, target, source string) {
		s.resource(s.prefix+"-"+strings.ToLower(scope), `
target:
  secret: {name: `+target+`}
  namespaces: {labels: [{matchLabels: {`+s.prefix+`: x}}]}
  kubelet: {scope: `+scope+`}
registry: {credentials: [{name: `+source+`, namespace: registry-access}]}`)
	}
	serve("Node", secretName, "hub")
	serve("Namespace", otherSecretName, "other")
	token := s.tokenFor(namespace, "default", "imps")
	becomes := func(image, token string, want int) {
		t.Helper()
		s.eventually(func() error {
			if got := len(p.asks(t, image, token)); got != want {
				return fmt.Errorf("%d answers for %s", got, image)
			}
			return nil
		}, "the record is not what it should be")
	}
	becomes("registry.one/app", "", 1)
	require.Empty(t, p.asks(t, "registry.one/app", token), "with a token, nothing of the node's")
	require.Empty(t, p.asks(t, "registry.two/app", token), "it is not selected")
	require.Empty(t, p.asks(t, "registry.two/app", ""))
	coordinator.stop()
	s.label(namespace, map[string]any{s.prefix: "x"})
	becomes("registry.two/app", token, 1)
	s.label(namespace, map[string]any{s.prefix: nil})
	becomes("registry.two/app", token, 0)
	s.label(namespace, map[string]any{s.prefix: "x"})
	becomes("registry.two/app", token, 1)

	agent.stop()
	require.Len(t, p.asks(t, "registry.one/app", ""), 1, "records outlive their agent")
	require.Len(t, p.asks(t, "registry.two/app", token), 1)
	s.agent("node-a", withCache)
	s.coordinator()
	s.deleteResource(s.prefix+"-node", metav1.DeletePropagationBackground)
	becomes("registry.one/app", "", 0)
	require.Len(t, p.asks(t, "registry.two/app", token), 1)
	s.deletePod(pod)
	becomes("registry.two/app", token, 0)
}

// The status of a resource says on how many nodes the credentials are where the kubelet's provider finds them, and why not on the
// others; and where its folder was wiped it is filled again.
func TestNodesSayWhetherTheyServeTheirKubelet(t *testing.T) {
	s := newSystem(t)
	s.patience = 2 * time.Minute // a cache is tried again after up to a minute
	p, withCache := s.provider()
	s.source("hub", dockerConfig("registry.one"))
	s.coordinator()
	s.agent("node-a", withCache)
	kubeletReady := func(status, message string) {
		t.Helper()
		s.becomes(s.prefix, func(is v1alpha1.ImagePullSecretStatus) error {
			c := meta.FindStatusCondition(is.Conditions, v1alpha1.ConditionKubeletReady)
			if c == nil || string(c.Status) != status || !strings.Contains(c.Message, message) {
				return fmt.Errorf("KubeletReady is not %s with %q", status, message)
			}
			return nil
		})
	}
	s.resource(s.prefix, `
target: {secret: {name: `+secretName+`}, kubelet: {scope: Node}}
registry: {credentials: [{name: hub, namespace: registry-access}]}`)
	kubeletReady("True", "1 of 1 nodes have said that their node cache is up to date")
	s.eventually(func() error {
		if len(p.asks(t, "registry.one/app", "")) == 0 {
			return errors.New("nothing")
		}
		return nil
	}, "the record does not come")

	broken := filepath.Join(t.TempDir(), "imps")
	require.NoError(t, os.WriteFile(broken, nil, 0o600))
	s.agent("node-b", func(c *nodeduty.Config) { c.CacheDir = broken })
	kubeletReady("False", "1 of 2 nodes have said that their node cache is up to date; not node-b: node cache "+broken)
	require.NoError(t, os.Remove(broken))
	kubeletReady("True", "2 of 2 nodes have")

	withoutCache := s.agent("node-c")
	kubeletReady("Unknown", "2 of 3 nodes have said that their node cache is up to date; the agents of 1 run without --node-cache-dir")
	withoutCache.stop()
	s.agent("node-c", func(c *nodeduty.Config) { c.CacheDir = filepath.Join(t.TempDir(), "imps") })
	kubeletReady("True", "3 of 3 nodes have")

	require.NoError(t, os.RemoveAll(p.cache))
	require.Empty(t, p.asks(t, "registry.one/app", ""))
	// At the agent's next pass, which comes every half a minute.
	require.Eventually(t, func() bool { return len(p.asks(t, "registry.one/app", "")) > 0 }, 5*time.Minute, 100*time.Millisecond)
}
