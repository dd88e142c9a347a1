package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imps-node/imps/test/fakeaws"
	"github.com/imps-node/imps/test/imps"
)

// cells is how many namespaces, and ServiceAccounts in each, TestEachCell has.
func cells(t *testing.T) int {
	t.Helper()
	n, err := strconv.Atoi(os.Getenv("IMPS_TEST_CELLS"))
	if os.Getenv("IMPS_TEST_CELLS") == "" {
		return 2
	}
	require.NoError(t, err, "IMPS_TEST_CELLS")
	return n
}

// Each Pod pulls what its namespace is selected for, and nothing else, whatever its ServiceAccount: all namespaces with all
// ServiceAccounts and ten registries. No registry sees a credential from whoever may not pull.
func TestEachCell(t *testing.T) {
	const registries = 10
	s := newSystem(t)
	n := cells(t)
	may := func(namespace, registry int) bool { return (3*namespace+registry)%4 < 2 }
	host := func(r int) string { return fmt.Sprintf("registry-%d.test", r) }
	var namespaces []string
	for range n {
		namespaces = append(namespaces, s.namespace())
	}
	for _, namespace := range namespaces {
		for a := range n {
			_, err := s.core.CoreV1().ServiceAccounts(namespace).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("account-", a)}}, metav1.CreateOptions{})
			require.NoError(t, err)
		}
	}
	for r := range registries {
		s.registry(host(r)).Allow("imps", fmt.Sprint(canary, r))
		s.source(fmt.Sprint("source-", r), fmt.Sprint(canary, r), host(r))
		var selected []string
		for i := range n {
			if may(i, r) {
				selected = append(selected, namespaces[i])
			}
		}
		// No Pod names the Secret.
		s.resource(fmt.Sprint(r), "{secret: {name: "+imps.SecretName+"}, namespaces: {names: ["+strings.Join(selected, ", ")+"]}, kubelet: {}}", secretOf(fmt.Sprint("source-", r)))
	}
	for _, namespace := range namespaces {
		for a := range n {
			var images []string
			for r := range registries {
				images = append(images, fmt.Sprintf("%s/%s/of-%d:v1", host(r), namespace, a))
			}
			s.pod(namespace, fmt.Sprint("pod-", a), fmt.Sprint("account-", a), images...)
		}
	}
	want, allowed := make([][]string, n), make([]int, registries)
	for i := range namespaces {
		for r := range registries {
			if may(i, r) {
				want[i] = append(want[i], pulled)
				allowed[r] += n
			} else {
				want[i] = append(want[i], refused)
			}
		}
	}
	for i, namespace := range namespaces {
		for a := range n {
			s.become(namespace, fmt.Sprint("pod-", a), want[i]...)
		}
	}
	for r := range registries {
		counts := s.registries.Host(host(r)).Counts()
		if require.GreaterOrEqual(t, counts.Pulled, allowed[r], host(r)); allowed[r] == 0 {
			require.Zero(t, counts.Pulled, host(r))
		}
		require.Zero(t, counts.Refused, "%s has seen credentials that are none", host(r))
		if allowed[r] < n*n {
			require.Positive(t, counts.Anonymous, host(r))
		}
	}
}

// With scope Node every Pod of the node pulls, of whatever namespace: while credentials are rotated, without an agent, without an
// API server, after the cache was wiped, and many at once.
func TestEveryPodOfANode(t *testing.T) {
	s := newSystem(t)
	namespace := s.namespace()
	var hosts []string
	for i := range 10 {
		hosts = append(hosts, fmt.Sprintf("registry-%d.test", i))
		s.registry(hosts[i]).Allow("imps", canary+"-old")
	}
	s.source("hub", canary+"-old", hosts...)
	s.resource("node", "{secret: {name: "+imps.SecretName+"}, kubelet: {scope: Node}}", secretOf("hub"))
	s.has(hosts[0]+"/app", "")
	// images are some that no node has seen.
	images := func(name string, n int) (all []string) {
		for i := range n {
			all = append(all, fmt.Sprintf("%s/%s/%d:v1", hosts[i%len(hosts)], name, i))
		}
		return all
	}
	s.runs(namespace, "first", images("first", 10)...)

	t.Log("rotated mid-flight, nothing is refused")
	for _, host := range hosts {
		s.registries.Host(host).Allow("imps", canary+"-old", canary+"-new")
	}
	for i := range 5 {
		if i == 2 {
			s.source("hub", canary+"-new", hosts...)
		}
		s.runs(namespace, fmt.Sprint("rotated-", i), images(fmt.Sprint("rotated-", i), 10)...)
	}
	s.eventually(func() error {
		if !s.holds(canary + "-new") {
			return errors.New("the cache has the old one")
		}
		return nil
	}, "the cache does not follow")
	for _, host := range hosts {
		s.registries.Host(host).Allow("imps", canary+"-new")
	}
	// The kubelet keeps an answer for five minutes, and forgets it with its end.
	require.NoError(t, s.node.RestartKubelet(t.Context()))
	s.runs(namespace, "rotated", images("rotated", 10)...)
	for _, host := range hosts {
		require.Zero(t, s.registries.Host(host).Counts().Refused, host)
	}

	t.Log("the agent was killed, and is away for 200 pulls")
	s.agent.Kill()
	require.NoError(t, s.node.RestartKubelet(t.Context())) // so that it has to ask
	for i := range 20 {
		s.pod(namespace, fmt.Sprint("away-", i), "default", images(fmt.Sprint("away-", i), 10)...)
	}
	for i := range 20 {
		s.becomePulled(namespace, fmt.Sprint("away-", i), 10)
	}
	s.startAgent()

	t.Log("the cache is wiped, and heals")
	require.NoError(t, os.Rename(s.cache, filepath.Join(t.TempDir(), "gone")))
	require.NoError(t, s.node.RestartKubelet(t.Context()))
	s.runs(namespace, "wiped", images("wiped", 10)...)

	t.Log("the API server is away")
	// A Pod whose pull fails is tried again, also without an API server.
	late := s.registry("late.test")
	s.pod(namespace, "orphaned", "default", "late.test/app:v1")
	s.become(namespace, "orphaned", refused)
	s.source("hub", canary+"-new", append(hosts, "late.test")...)
	s.has("late.test/app", "")
	s.withoutAPIServer(func() {
		late.Allow("imps", canary+"-new") // not before: it is pulled without an API server
		s.eventually(func() error {
			if late.Counts().Pulled == 0 {
				return errors.New("nothing was pulled")
			}
			return nil
		}, "the kubelet does not pull")
	})
	s.becomePulled(namespace, "orphaned", 1)
}

// A kubelet reads the ServiceAccount of a Pod, live, before it asks a provider with a token (1.36: getServiceAccount in
// pkg/kubelet/kubelet.go), whether or not it has one: without an API server scope Namespace is not served, and goes on with it.
func TestPodsOfANamespaceWithoutAPIServer(t *testing.T) {
	s := newSystem(t)
	namespace := s.namespace()
	r := s.registry("registry.test")
	s.pod(namespace, "p", "default", "registry.test/app:v1")
	s.become(namespace, "p", refused) // it has asked with the Pod's token, in vain
	s.source("hub", canary, "registry.test")
	s.resource("a", "{secret: {name: "+imps.SecretName+"}, namespaces: {names: ["+namespace+"]}, kubelet: {}}", secretOf("hub"))
	s.has("registry.test/app", s.tokenFor(namespace))
	s.withoutAPIServer(func() {
		r.Allow("imps", canary) // not before: it would be pulled if the provider were asked
		s.eventually(func() error {
			log, err := os.ReadFile(s.node.Log())
			if err == nil && !strings.Contains(string(log), "failed to get service account: ") {
				err = errors.New("it has not tried")
			}
			return err
		}, "the kubelet does not try")
		require.Zero(t, r.Counts().Pulled)
	})
	s.becomePulled(namespace, "p", 1)
}

// A hundred Pods with a hundred images of ECR at once, while AWS is away: nobody calls it, and all are answered.
func TestManyPodsAtOnceWithoutAWS(t *testing.T) {
	s := newSystem(t)
	namespace := s.namespace()
	s.registry(frankfurt).Guard(func(next http.Handler) http.Handler { return s.aws.Guard("eu-central-1", next) })
	s.resource("ecr", "{secret: {name: "+imps.SecretName+"}, namespaces: {names: ["+namespace+"]}, kubelet: {}}", "{ecr: {registries: ["+frankfurt+"]}}")
	s.pod(namespace, "first", "default", frankfurt+"/first:v1")
	s.becomePulled(namespace, "first", 1)
	require.NoError(t, s.node.RestartKubelet(t.Context()))
	require.NotEmpty(t, s.aws.Calls())
	s.aws.Faults(func(fakeaws.Call) *fakeaws.Fault { return &fakeaws.Fault{Hang: true} })
	for i := range 100 {
		s.pod(namespace, fmt.Sprint("p-", i), "default", fmt.Sprintf("%s/many/%d:v1", frankfurt, i))
	}
	for i := range 100 {
		s.becomePulled(namespace, fmt.Sprint("p-", i), 1)
	}
	require.Empty(t, s.aws.Calls(), "nobody has asked AWS since")
	require.Zero(t, s.registries.Host(frankfurt).Counts().Refused)
}

// The Pods of a Deployment whose ServiceAccount names the Secret pull at the first try.
func TestADeploymentWithAnAttachedServiceAccount(t *testing.T) {
	s := newSystem(t)
	namespace := s.namespace()
	s.registry("registry.test").Allow("imps", canary)
	s.source("hub", canary, "registry.test")
	s.resource("a", "{secret: {name: "+imps.SecretName+"}, namespaces: {names: ["+namespace+"]}, serviceAccounts: {names: [default]}}", secretOf("hub"))
	s.eventually(func() error {
		account, err := s.core.CoreV1().ServiceAccounts(namespace).Get(t.Context(), "default", metav1.GetOptions{})
		if err == nil && len(account.ImagePullSecrets) == 0 {
			err = errors.New("it names nothing")
		}
		return err
	}, "the ServiceAccount is not attached")
	replicas := int32(5)
	labels := map[string]string{"app": "web"}
	_, err := s.core.AppsV1().Deployments(namespace).Create(t.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: appsv1.DeploymentSpec{Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: labels}, Template: corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Labels: labels},
			// There is no scheduler.
			Spec: corev1.PodSpec{NodeName: s.node.Name(), Containers: []corev1.Container{{Name: "web", Image: "registry.test/web:v1"}}},
		}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	s.eventually(func() error {
		d, err := s.core.AppsV1().Deployments(namespace).Get(t.Context(), "web", metav1.GetOptions{})
		if err == nil && d.Status.ReadyReplicas != replicas {
			err = fmt.Errorf("%d are ready", d.Status.ReadyReplicas)
		}
		return err
	}, "the Deployment does not become ready")
	events, err := s.core.CoreV1().Events(namespace).List(t.Context(), metav1.ListOptions{FieldSelector: "reason=Failed"})
	require.NoError(t, err)
	require.Empty(t, events.Items)
}

// withoutAPIServer does something while the API server is away.
func (s *system) withoutAPIServer(do func()) {
	s.t.Helper()
	require.NoError(s.t, control.StopAPIServer())
	defer func() { require.NoError(s.t, control.StartAPIServer(context.WithoutCancel(s.t.Context()))) }()
	do()
}

// tokenFor is a token as the kubelet gets it for a Pod of a namespace.
func (s *system) tokenFor(namespace string) string {
	s.t.Helper()
	request, err := s.core.CoreV1().ServiceAccounts(namespace).CreateToken(s.t.Context(), "default",
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{"imps"}}}, metav1.CreateOptions{})
	require.NoError(s.t, err)
	return request.Status.Token
}

// holds reports whether some record of the node holds a text.
func (s *system) holds(text string) bool {
	s.t.Helper()
	files, err := filepath.Glob(filepath.Join(s.cache, "node", "h-*"))
	require.NoError(s.t, err)
	for _, file := range files {
		raw, err := os.ReadFile(file)
		require.NoError(s.t, err)
		if strings.Contains(string(raw), text) {
			return true
		}
	}
	return false
}
