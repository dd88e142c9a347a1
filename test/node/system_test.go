package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/fakeaws"
	"github.com/imps-node/imps/test/imps"
	"github.com/imps-node/imps/test/registry"
)

const (
	// within is how long anything may take: a kubelet whose pull failed waits up to five minutes for the next try.
	within = 6 * time.Minute
	canary = "canary-2d96b4-never-printed"
	// frankfurt is a registry of ECR, which the coordinator may pull from.
	frankfurt = "123456789012.dkr.ecr.eu-central-1.amazonaws.com"
)

// The provider under the two names that the kubelet's configuration has for it.
const forNode, forNamespace = "imps-credprovider", "imps-credprovider-namespace"

// system is a node with a kubelet that asks imps-credprovider, and imps, for one test.
type system struct {
	t       *testing.T
	core    kubernetes.Interface
	dynamic dynamic.Interface
	// prefix starts the names of everything cluster-scoped that the test makes.
	prefix string
	// dir holds the kubeconfigs and logs of its processes, cache is the node cache.
	dir, cache string
	aws        *fakeaws.Server
	awsURL     string
	registries *registry.Hosts
	node       *cluster.Node
	agent      *imps.Process
}

// newSystem starts it; the kubelet asks for registries below .test, and for ECR's.
func newSystem(t *testing.T) *system {
	t.Helper()
	cluster.NeedNode(t)
	core, err := kubernetes.NewForConfig(control.Admin())
	require.NoError(t, err)
	dyn, err := dynamic.NewForConfig(control.Admin())
	require.NoError(t, err)
	s := &system{t: t, core: core, dynamic: dyn, prefix: cluster.Prefix(t), dir: t.TempDir(), cache: filepath.Join(t.TempDir(), "imps"), aws: fakeaws.New()}
	s.aws.AddKey(fakeaws.Key{AccessKeyID: "AKIACOORDINATOR", SecretAccessKey: canary, Principal: "arn:aws:iam::111111111111:user/coordinator"})
	server := httptest.NewServer(s.aws)
	s.awsURL = server.URL
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	s.registries, err = registry.StartHosts(t.Context(), control, distribution, t.TempDir())
	require.NoError(t, err)
	t.Cleanup(s.registries.Stop)
	t.Cleanup(s.removeEverything)

	bin := t.TempDir()
	require.NoError(t, os.Link(provider, filepath.Join(bin, forNode)))
	require.NoError(t, os.Symlink(forNode, filepath.Join(bin, forNamespace)))
	config := filepath.Join(t.TempDir(), "config.yaml")
	// As docs/nodes.md has it.
	require.NoError(t, os.WriteFile(config, []byte(`
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: `+forNode+`
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  matchImages: ["*.dkr.ecr.*.amazonaws.com", "*.test"]
  defaultCacheDuration: "0s"
  args: ["--cache-dir=`+s.cache+`"]
- name: `+forNamespace+`
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  matchImages: ["*.dkr.ecr.*.amazonaws.com", "*.test"]
  defaultCacheDuration: "0s"
  args: ["--cache-dir=`+s.cache+`", "--scope=Namespace"]
  tokenAttributes:
    serviceAccountTokenAudience: imps
    cacheType: ServiceAccount
    requireServiceAccount: true
`), 0o600))
	s.node = control.NodeFor(t, cluster.NodeConfig{Name: s.prefix, CredentialProviderConfig: config, CredentialProviderBinDir: bin})
	t.Cleanup(s.findCanaries)

	spec, err := imps.Coordinator(t.Context(), control)
	require.NoError(t, err)
	spec.Env = append(spec.Env, "AWS_ENDPOINT_URL_ECR="+s.awsURL, "AWS_ACCESS_KEY_ID=AKIACOORDINATOR", "AWS_SECRET_ACCESS_KEY="+canary, "AWS_EC2_METADATA_DISABLED=true")
	s.start(spec)
	s.startAgent()
	return s
}

func (s *system) startAgent() {
	s.t.Helper()
	spec, err := imps.Agent(s.t.Context(), control, s.node.Name())
	require.NoError(s.t, err)
	spec.Args = append(spec.Args, "--node-cache-dir="+s.cache)
	s.agent = s.start(spec)
	ctx, cancel := context.WithTimeout(s.t.Context(), within)
	defer cancel()
	require.NoError(s.t, s.agent.AwaitReady(ctx))
}

func (s *system) start(spec imps.Spec) *imps.Process {
	s.t.Helper()
	p, err := imps.Start(context.WithoutCancel(s.t.Context()), control, binary, s.dir, spec)
	require.NoError(s.t, err)
	s.t.Cleanup(func() {
		select {
		case <-p.Ended():
		default:
			require.NoError(s.t, p.Terminate())
		}
	})
	return p
}

// removeEverything deletes what the test made, so that the next one starts from nothing.
func (s *system) removeEverything() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	all := metav1.ListOptions{}
	grace := int64(0)
	require.NoError(s.t, s.dynamic.Resource(v1alpha1.Resource).DeleteCollection(ctx, metav1.DeleteOptions{}, all))
	require.NoError(s.t, s.core.CoreV1().Secrets(imps.SourceNamespace).DeleteCollection(ctx, metav1.DeleteOptions{}, all))
	labelled := metav1.ListOptions{LabelSelector: impsync.LabelComponent}
	for _, namespace := range []string{imps.SystemNamespace, imps.RenderedNamespace} {
		require.NoError(s.t, s.core.CoreV1().Secrets(namespace).DeleteCollection(ctx, metav1.DeleteOptions{}, labelled))
	}
	require.NoError(s.t, s.core.CoreV1().ConfigMaps(imps.SystemNamespace).DeleteCollection(ctx, metav1.DeleteOptions{}, labelled))
	pods, err := s.core.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + s.prefix})
	require.NoError(s.t, err)
	for _, p := range pods.Items {
		err := s.core.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: &grace})
		if !apierrors.IsNotFound(err) {
			require.NoError(s.t, err)
		}
	}
	err = s.core.CoreV1().Nodes().Delete(ctx, s.prefix, metav1.DeleteOptions{})
	if !apierrors.IsNotFound(err) {
		require.NoError(s.t, err)
	}
}

// findCanaries looks for passwords and ECR's tokens where they must not be.
func (s *system) findCanaries() {
	needles := []string{canary}
	for _, g := range s.aws.Grants() {
		needles = append(needles, g.Password)
	}
	logs, err := filepath.Glob(filepath.Join(s.dir, "*.log"))
	require.NoError(s.t, err)
	for _, log := range append(logs, s.node.Log()) {
		raw, err := os.ReadFile(log)
		require.NoError(s.t, err)
		for _, needle := range needles {
			require.NotContains(s.t, string(raw), needle, log)
		}
		require.NotContains(s.t, string(raw), "DATA RACE", log)
	}
}

// eventually waits until check returns no error.
func (s *system) eventually(check func() error, message string, args ...any) {
	s.t.Helper()
	imps.Eventually(s.t, within, check, message, args...)
}

// registry returns the registry of a host, which the node can reach from now on.
func (s *system) registry(host string) *registry.Host {
	s.t.Helper()
	h := s.registries.Host(host)
	require.NoError(s.t, s.node.SetRegistry(host, h.Address))
	return h
}

// source writes a source Secret with one password for each of these registries.
func (s *system) source(name, password string, hosts ...string) {
	s.t.Helper()
	auths := map[string]any{}
	for _, host := range hosts {
		auths[host] = map[string]string{"username": "imps", "password": password}
	}
	raw, err := json.Marshal(map[string]any{"auths": auths})
	require.NoError(s.t, err)
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: imps.SourceNamespace, Name: name}, Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: raw},
	}
	secrets := s.core.CoreV1().Secrets(imps.SourceNamespace)
	_, err = secrets.Create(s.t.Context(), secret, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = secrets.Update(s.t.Context(), secret, metav1.UpdateOptions{})
	}
	require.NoError(s.t, err)
}

// resource creates an ImagePullSecret with this target and one source, both in YAML.
func (s *system) resource(name, target, source string) {
	s.t.Helper()
	spec := map[string]any{}
	require.NoError(s.t, yaml.Unmarshal([]byte("target: "+target+"\nregistry: {credentials: ["+source+"]}"), &spec))
	_, err := s.dynamic.Resource(v1alpha1.Resource).Create(s.t.Context(), &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": v1alpha1.GroupVersion.String(), "kind": v1alpha1.Kind.Kind, "metadata": map[string]any{"name": s.prefix + "-" + name}, "spec": spec,
	}}, metav1.CreateOptions{})
	require.NoError(s.t, err)
}

// secretOf is a source in YAML.
func secretOf(name string) string {
	return "{name: " + name + ", namespace: " + imps.SourceNamespace + "}"
}

// namespace makes one, and waits until it has its ServiceAccount.
func (s *system) namespace() string {
	s.t.Helper()
	name := control.Namespace(s.t, nil)
	s.eventually(func() error {
		_, err := s.core.CoreV1().ServiceAccounts(name).Get(s.t.Context(), "default", metav1.GetOptions{})
		return err
	}, "namespace %s has no ServiceAccount", name)
	return name
}

// pod makes a Pod with one container for each image, whose name is the number of the image.
func (s *system) pod(namespace, name, account string, images ...string) {
	s.t.Helper()
	grace := int64(0)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       corev1.PodSpec{NodeName: s.node.Name(), ServiceAccountName: account, TerminationGracePeriodSeconds: &grace},
	}
	for i, image := range images {
		pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: fmt.Sprint("c", i), Image: image})
	}
	_, err := s.core.CoreV1().Pods(namespace).Create(s.t.Context(), pod, metav1.CreateOptions{})
	require.NoError(s.t, err)
}

// pulled and refused are what can become of a container: it runs, or the kubelet had no credentials for it.
const pulled, refused = "pulled", "refused"

// become waits until the containers of a Pod have become all of this.
func (s *system) become(namespace, name string, want ...string) {
	s.t.Helper()
	s.eventually(func() error {
		p, err := s.core.CoreV1().Pods(namespace).Get(s.t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if len(p.Status.ContainerStatuses) != len(want) {
			return errors.New("it has not begun")
		}
		for _, c := range p.Status.ContainerStatuses { // sorted by name
			var i int
			if _, err := fmt.Sscanf(c.Name, "c%d", &i); err != nil {
				return err
			}
			is := ""
			switch {
			case c.State.Running != nil:
				is = pulled
			case c.State.Waiting != nil && strings.Contains(c.State.Waiting.Message, "no basic auth credentials"):
				is = refused
			}
			if is != want[i] {
				return fmt.Errorf("container %d of %s (%s) is not %s: %v", i, name, c.Image, want[i], c.State)
			}
		}
		return nil
	}, "a Pod of %s does not become what it should", namespace)
}

// runs makes a Pod with these images, and waits until all have been pulled.
func (s *system) runs(namespace, name string, images ...string) {
	s.t.Helper()
	s.pod(namespace, name, "default", images...)
	s.becomePulled(namespace, name, len(images))
}

func (s *system) becomePulled(namespace, name string, n int) {
	s.t.Helper()
	s.become(namespace, name, strings.Split(strings.TrimSuffix(strings.Repeat(pulled+" ", n), " "), " ")...)
}

// has waits until the provider has credentials for an image, asked as the kubelet does.
func (s *system) has(image, token string) {
	s.t.Helper()
	s.eventually(func() error {
		if s.ask(image, token) == 0 {
			return errors.New("it has none")
		}
		return nil
	}, "the provider has no credentials for %s", image)
}

// ask returns how many credentials the provider has.
func (s *system) ask(image, token string) int {
	s.t.Helper()
	request, err := json.Marshal(map[string]string{
		"apiVersion": "credentialprovider.kubelet.k8s.io/v1", "kind": "CredentialProviderRequest", "image": image, "serviceAccountToken": token,
	})
	require.NoError(s.t, err)
	command := exec.CommandContext(s.t.Context(), provider, "--cache-dir="+s.cache)
	command.Stdin = strings.NewReader(string(request))
	out, err := command.Output()
	require.NoError(s.t, err)
	var answer struct {
		Auth map[string]any `json:"auth"`
	}
	require.NoError(s.t, json.Unmarshal(out, &answer))
	return len(answer.Auth)
}
