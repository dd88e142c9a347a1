package integration

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/stretchr/testify/require"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
	clusterduty "github.com/imps-node/imps/pkg/sync/cluster"
	nodeduty "github.com/imps-node/imps/pkg/sync/node"
	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

const (
	// within is the deadline of what should take milliseconds.
	within = 10 * time.Second
	// linger replaces the minute that a Secret stays after the last Pod.
	linger = 2 * time.Second

	canaryUser     = "canary-user"
	canaryPassword = "canary-4b1d0c-never-printed"
)

// system is imps at work for one test.
type system struct {
	t       *testing.T
	control *cluster.Cluster
	core    kubernetes.Interface
	dynamic dynamic.Interface
	metrics *impsync.Metrics
	// gatherers are the metrics of all duties that the test has run.
	gatherers prometheus.Gatherers
	// began is where the audit log of this test begins.
	began cluster.Mark
	// prefix starts the names of everything cluster-scoped that the test makes.
	prefix string
	// running is the last coordinator that was started, leader its identity.
	running *process
	leader  string
	// kept is a namespace that stays selected, for tables.
	kept string
	// proxy stands between the duties and the API server, where a test wants one.
	proxy *cluster.Proxy
	// patience is how long eventually waits.
	patience time.Duration
}

func newSystem(t *testing.T) *system {
	t.Helper()
	return newSystemOn(t, control)
}

func newSystemOn(t *testing.T, control *cluster.Cluster) *system {
	t.Helper()
	core, err := kubernetes.NewForConfig(control.Admin())
	require.NoError(t, err)
	dyn, err := dynamic.NewForConfig(control.Admin())
	require.NoError(t, err)
	s := &system{t: t, control: control, core: core, dynamic: dyn, prefix: cluster.Prefix(t), began: control.Audit().Mark(), patience: within}
	s.metrics = impsync.NewMetrics(s.newRegistry())
	t.Cleanup(func() {
		s.findCanaries()
		s.removeEverything()
	})
	return s
}

func (s *system) newRegistry() *prometheus.Registry {
	registry := prometheus.NewRegistry()
	s.gatherers = append(s.gatherers, registry)
	return registry
}

// removeEverything deletes what the test made, so that the next one starts from nothing.
func (s *system) removeEverything() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	images := s.dynamic.Resource(v1alpha1.Resource)
	require.NoError(s.t, images.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}))
	require.NoError(s.t, s.core.CoreV1().Secrets(sourceNamespace).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}))
	require.NoError(s.t, s.core.CoreV1().ConfigMaps(systemNamespace).DeleteCollection(ctx, metav1.DeleteOptions{},
		metav1.ListOptions{LabelSelector: impsync.LabelComponent}))
	for _, namespace := range []string{systemNamespace, renderedNamespace} {
		require.NoError(s.t, s.core.CoreV1().Secrets(namespace).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: impsync.LabelComponent}))
	}
	require.NoError(s.t, s.core.CoreV1().Nodes().DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}))
	grace := int64(0)
	require.NoError(s.t, s.core.CoreV1().Pods(systemNamespace).DeleteCollection(ctx, metav1.DeleteOptions{GracePeriodSeconds: &grace}, metav1.ListOptions{}))
}

// findCanaries looks for the credentials where they must not be.
func (s *system) findCanaries() {
	ctx := context.Background()
	s.t.Helper()
	check := func(where string, object any) {
		raw, err := json.Marshal(object)
		require.NoError(s.t, err)
		require.NoError(s.t, findCanary(where, string(raw)))
	}
	events, err := s.core.CoreV1().Events("").List(ctx, metav1.ListOptions{})
	require.NoError(s.t, err)
	check("Events", events)
	images, err := s.dynamic.Resource(v1alpha1.Resource).List(ctx, metav1.ListOptions{})
	require.NoError(s.t, err)
	check("ImagePullSecrets", images)
	configMaps, err := s.core.CoreV1().ConfigMaps("").List(ctx, metav1.ListOptions{})
	require.NoError(s.t, err)
	check("ConfigMaps", configMaps)
	secrets, err := s.core.CoreV1().Secrets("").List(ctx, metav1.ListOptions{})
	require.NoError(s.t, err)
	for _, secret := range secrets.Items {
		check("metadata of Secret "+secret.Namespace+"/"+secret.Name, secret.ObjectMeta)
	}
	answer := httptest.NewRecorder()
	promhttp.HandlerFor(s.gatherers, promhttp.HandlerOpts{}).ServeHTTP(answer, httptest.NewRequestWithContext(ctx, "GET", "/metrics", nil))
	require.NoError(s.t, findCanary("metrics", answer.Body.String()))
}

// findCanary returns an error where text holds the canary credential in any form.
func findCanary(where, text string) error {
	pair := canaryUser + ":" + canaryPassword
	for form, needle := range map[string]string{
		"raw":                     canaryPassword,
		"base64":                  base64.StdEncoding.EncodeToString([]byte(canaryPassword)),
		"base64 of user:password": base64.StdEncoding.EncodeToString([]byte(pair)),
		"twice base64":            base64.StdEncoding.EncodeToString([]byte(base64.StdEncoding.EncodeToString([]byte(pair)))),
	} {
		if strings.Contains(text, strings.TrimRight(needle, "=")) {
			return fmt.Errorf("the canary credential stands in %s (%s)", where, form)
		}
	}
	return nil
}

// process is a duty that runs.
type process struct {
	stop  func()
	ready func() error
}

func (s *system) start(run func(context.Context) error, ready func() error) *process {
	s.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	stopped := false
	p := &process{ready: ready, stop: func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			require.NoError(s.t, err)
		case <-time.After(30 * time.Second):
			require.Fail(s.t, "a duty does not stop")
		}
	}}
	s.t.Cleanup(p.stop)
	return p
}

// coordinator runs the cluster duty with the chart's identity, and waits until it leads.
func (s *system) coordinator(change ...func(*clusterduty.Config)) *process {
	s.t.Helper()
	p := s.standby(change...)
	s.running = p
	s.eventually(p.ready, "the coordinator does not lead")
	return p
}

// standby runs the cluster duty and does not wait; ready tells whether it leads.
func (s *system) standby(change ...func(*clusterduty.Config)) *process {
	s.t.Helper()
	token, err := s.control.Token(s.t.Context(), systemNamespace, "imps-coordinator")
	require.NoError(s.t, err)
	config := clusterduty.Config{
		Namespace: systemNamespace, RenderedNamespace: renderedNamespace,
		TargetSecretNames: []string{secretName, otherSecretName},
		SourceNamespaces:  []string{sourceNamespace},
		Identity:          cluster.Prefix(s.t),
		DemandLinger:      linger,
		Client:            s.config(token, "coordinator"),
		Metrics:           s.metrics, Registry: s.newRegistry(), Log: logger(),
	}
	for _, c := range change {
		c(&config)
	}
	c, err := clusterduty.New(config)
	require.NoError(s.t, err)
	if s.leader == "" {
		s.leader = config.Identity
	}
	return s.start(c.Run, func() error {
		if !c.Leading() {
			return errors.New("it does not lead")
		}
		return c.Ready()
	})
}

// agent runs the node duty with a token as the chart's DaemonSet has it on this node.
func (s *system) agent(nodeName string, change ...func(*nodeduty.Config)) *process {
	s.t.Helper()
	config := nodeduty.Config{
		NodeName: nodeName, Namespace: systemNamespace, RenderedNamespace: renderedNamespace,
		Client:  s.config(s.nodeToken(nodeName), "agent/"+nodeName),
		Metrics: s.metrics, Registry: s.newRegistry(), Log: logger(),
	}
	for _, c := range change {
		c(&config)
	}
	a, err := nodeduty.New(config)
	require.NoError(s.t, err)
	p := s.start(a.Run, a.Ready)
	s.eventually(p.ready, "the agent does not become ready")
	return p
}

func (s *system) nodeToken(nodeName string) string {
	s.t.Helper()
	require.NoError(s.t, s.control.Node(s.t.Context(), nodeName))
	token, err := s.control.NodeToken(s.t.Context(), systemNamespace, "imps-node", nodeName)
	require.NoError(s.t, err)
	return token
}

// config is a connection whose requests the audit log tells apart by their user agent.
func (s *system) config(token, agent string) *rest.Config {
	config := s.control.ConfigForToken(token)
	config.UserAgent = "imps-test/" + agent
	if s.proxy != nil {
		return s.proxy.Config(config)
	}
	return config
}

// eventually waits until check returns no error.
func (s *system) eventually(check func() error, message string, args ...any) {
	s.t.Helper()
	imps.Eventually(s.t, s.patience, check, message, args...)
}

// dockerConfig returns a docker config with the canary as the password of each registry.
func dockerConfig(registries ...string) []byte {
	auths := map[string]map[string]string{}
	for _, registry := range registries {
		auths[registry] = map[string]string{"username": canaryUser, "password": canaryPassword}
	}
	raw, err := json.Marshal(map[string]any{"auths": auths})
	if err != nil {
		panic(err)
	}
	return raw
}

// source writes a source Secret.
func (s *system) source(name string, config []byte) {
	s.t.Helper()
	s.writeSecret(&corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: sourceNamespace, Name: name},
		Type:       corev1.SecretTypeDockerConfigJson,
		Data:       map[string][]byte{corev1.DockerConfigJsonKey: config},
	})
}

func (s *system) writeSecret(secret *corev1.Secret) *corev1.Secret {
	s.t.Helper()
	secrets := s.core.CoreV1().Secrets(secret.Namespace)
	written, err := secrets.Create(s.t.Context(), secret, metav1.CreateOptions{FieldManager: "a-user"})
	if apierrors.IsAlreadyExists(err) {
		written, err = secrets.Update(s.t.Context(), secret, metav1.UpdateOptions{FieldManager: "a-user"})
	}
	require.NoError(s.t, err)
	return written
}

// resource creates an ImagePullSecret from the YAML of its spec, "" for none.
func (s *system) resource(name, spec string) *v1alpha1.ImagePullSecret {
	s.t.Helper()
	object := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": v1alpha1.GroupVersion.String(), "kind": v1alpha1.Kind.Kind,
		"metadata": map[string]any{"name": name},
	}}
	if spec != "" {
		parsed := map[string]any{}
		require.NoError(s.t, yaml.Unmarshal([]byte(spec), &parsed))
		object.Object["spec"] = parsed
	}
	created, err := s.dynamic.Resource(v1alpha1.Resource).Create(s.t.Context(), object, metav1.CreateOptions{})
	require.NoError(s.t, err)
	return typed(s.t, created)
}

// change patches the spec of an ImagePullSecret with a merge patch in YAML.
func (s *system) change(name, patch string) {
	s.t.Helper()
	raw, err := yaml.YAMLToJSON([]byte(patch))
	require.NoError(s.t, err)
	_, err = s.dynamic.Resource(v1alpha1.Resource).Patch(s.t.Context(), name, "application/merge-patch+json", raw, metav1.PatchOptions{})
	require.NoError(s.t, err)
}

func (s *system) deleteResource(name string, policy metav1.DeletionPropagation) {
	s.t.Helper()
	require.NoError(s.t, s.dynamic.Resource(v1alpha1.Resource).Delete(s.t.Context(), name, metav1.DeleteOptions{PropagationPolicy: &policy}))
}

func (s *system) get(name string) *v1alpha1.ImagePullSecret {
	s.t.Helper()
	object, err := s.dynamic.Resource(v1alpha1.Resource).Get(s.t.Context(), name, metav1.GetOptions{})
	require.NoError(s.t, err)
	return typed(s.t, object)
}

func typedObject(t *testing.T, object runtime.Object) *v1alpha1.ImagePullSecret {
	t.Helper()
	u, ok := object.(*unstructured.Unstructured)
	require.True(t, ok)
	return typed(t, u)
}

func typed(t *testing.T, object *unstructured.Unstructured) *v1alpha1.ImagePullSecret {
	t.Helper()
	r := &v1alpha1.ImagePullSecret{}
	require.NoError(t, runtime.DefaultUnstructuredConverter.FromUnstructured(object.Object, r))
	return r
}

// namespace creates a namespace with labels and annotations.
func (s *system) namespace(labels, annotations map[string]string) string {
	s.t.Helper()
	name := s.control.Namespace(s.t, labels)
	if annotations != nil {
		s.annotate(name, annotations)
	}
	return name
}

func (s *system) annotate(namespace string, annotations map[string]string) {
	s.patchNamespace(namespace, map[string]any{"metadata": map[string]any{"annotations": annotations}})
}

// label sets labels of a namespace; a nil value removes one.
func (s *system) label(namespace string, labels map[string]any) {
	s.patchNamespace(namespace, map[string]any{"metadata": map[string]any{"labels": labels}})
}

func (s *system) patchNamespace(namespace string, patch any) {
	s.t.Helper()
	raw, err := json.Marshal(patch)
	require.NoError(s.t, err)
	_, err = s.core.CoreV1().Namespaces().Patch(s.t.Context(), namespace, "application/merge-patch+json", raw, metav1.PatchOptions{})
	require.NoError(s.t, err)
}

// pod creates a Pod that is bound to a node and waits for its image.
func (s *system) pod(namespace, nodeName string, labels, annotations map[string]string) *corev1.Pod {
	s.t.Helper()
	grace, automount := int64(0), false
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "pod-", Namespace: namespace, Labels: labels, Annotations: annotations},
		Spec: corev1.PodSpec{
			NodeName: nodeName, TerminationGracePeriodSeconds: &grace, AutomountServiceAccountToken: &automount,
			ServiceAccountName: "default",
			Containers:         []corev1.Container{{Name: "main", Image: "registry.invalid/main"}},
		},
	}
	var created *corev1.Pod
	s.eventually(func() (err error) { // until the namespace has its ServiceAccount
		created, err = s.core.CoreV1().Pods(namespace).Create(s.t.Context(), pod, metav1.CreateOptions{})
		return err
	}, "cannot create a Pod")
	return created
}

func (s *system) deletePod(pod *corev1.Pod) {
	s.t.Helper()
	grace := int64(0)
	require.NoError(s.t, s.core.CoreV1().Pods(pod.Namespace).Delete(s.t.Context(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &grace}))
}

// secret returns a Secret, nil where there is none.
func (s *system) secret(namespace, name string) *corev1.Secret {
	s.t.Helper()
	secret, err := s.core.CoreV1().Secrets(namespace).Get(s.t.Context(), name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	require.NoError(s.t, err)
	return secret
}

// has waits until the namespace has a pull Secret for exactly these registries.
func (s *system) has(namespace string, registries ...string) *corev1.Secret {
	s.t.Helper()
	return s.hasNamed(namespace, secretName, registries...)
}

func (s *system) hasNamed(namespace, name string, registries ...string) *corev1.Secret {
	s.t.Helper()
	slices.Sort(registries)
	var found *corev1.Secret
	s.eventually(func() error {
		found = s.secret(namespace, name)
		if found == nil {
			return fmt.Errorf("no Secret %s/%s", namespace, name)
		}
		if have := registriesOf(s.t, found); !slices.Equal(have, registries) {
			return fmt.Errorf("Secret %s/%s has registries %v, not %v", namespace, name, have, registries)
		}
		return nil
	}, "the pull Secret does not come")
	return found
}

// lacks waits until the namespace has no pull Secret.
func (s *system) lacks(namespace string) {
	s.t.Helper()
	s.lacksNamed(namespace, secretName)
}

func (s *system) lacksNamed(namespace, name string) {
	s.t.Helper()
	s.eventually(func() error {
		if s.secret(namespace, name) != nil {
			return fmt.Errorf("Secret %s/%s is there", namespace, name)
		}
		return nil
	}, "the pull Secret does not go")
}

func registriesOf(t *testing.T, secret *corev1.Secret) []string {
	t.Helper()
	var config struct {
		Auths map[string]json.RawMessage `json:"auths"`
	}
	require.NoError(t, json.Unmarshal(secret.Data[corev1.DockerConfigJsonKey], &config))
	registries := []string{}
	for registry := range config.Auths {
		registries = append(registries, registry)
	}
	slices.Sort(registries)
	return registries
}

// becomes waits until the status of a resource passes check.
func (s *system) becomes(name string, check func(v1alpha1.ImagePullSecretStatus) error) v1alpha1.ImagePullSecretStatus {
	s.t.Helper()
	var r *v1alpha1.ImagePullSecret
	s.eventually(func() error {
		r = s.get(name)
		if err := check(r.Status); err != nil {
			return fmt.Errorf("%w; status: %+v", err, r.Status)
		}
		return nil
	}, "the status of %s does not come", name)
	return r.Status
}

// ready waits for a true status that says Ready with so many namespaces.
func (s *system) ready(name string, namespaces int) v1alpha1.ImagePullSecretStatus {
	s.t.Helper()
	return s.becomes(name, func(status v1alpha1.ImagePullSecretStatus) error {
		if status.Status != v1alpha1.StatusReady || status.Namespaces == nil ||
			status.Namespaces.Delivered != int64(namespaces) || status.Namespaces.Selected != int64(namespaces) {
			return fmt.Errorf("not Ready with %d namespaces", namespaces)
		}
		return nil
	})
}

// failed waits for a status that says Failed with a reason that holds all these texts.
func (s *system) failed(name string, texts ...string) v1alpha1.ImagePullSecretStatus {
	s.t.Helper()
	return s.becomes(name, func(status v1alpha1.ImagePullSecretStatus) error {
		if status.Status != v1alpha1.StatusFailed {
			return fmt.Errorf("not Failed")
		}
		for _, text := range texts {
			if !strings.Contains(status.Reason, text) {
				return fmt.Errorf("the reason does not say %q", text)
			}
		}
		return nil
	})
}

func base64Of(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) }

// replaceKey gives KEY in a test's table a name of its own.
func replaceKey(text, key string) string { return strings.ReplaceAll(text, "KEY", key) }

// secretWrites returns the successful writes of target Secrets since mark by processes
// whose user agent has this end.
func (s *system) secretWrites(mark cluster.Mark, agent string) []cluster.Event {
	s.t.Helper()
	var writes []cluster.Event
	for _, e := range s.requests(mark, agent) {
		if e.Resource == "secrets" && e.Code < 300 && e.Verb != "get" && e.Verb != "list" && e.Verb != "watch" &&
			e.Namespace != systemNamespace && e.Namespace != renderedNamespace {
			writes = append(writes, e)
		}
	}
	return writes
}

// calm waits until imps has tried to write nothing but Lease and Events for longer than a
// status waits for its next write: what is tried again and again never becomes calm.
func (s *system) calm() {
	s.t.Helper()
	s.eventually(func() error {
		mark := s.control.Audit().Mark()
		pass(s.t, 1600*time.Millisecond)
		for _, e := range s.requests(mark, "") {
			if strings.HasPrefix(e.UserAgent, "imps-test/") && slices.Contains([]string{"create", "update", "patch", "delete"}, e.Verb) &&
				e.Resource != "leases" && e.Resource != "events" {
				return fmt.Errorf("%s: %s %s %s/%s: %d", e.UserAgent, e.Verb, e.Resource, e.Namespace, e.Name, e.Code)
			}
		}
		return nil
	}, "imps goes on writing")
}

// requests returns the answered requests since mark of processes whose user agent has this end.
func (s *system) requests(mark cluster.Mark, agent string) []cluster.Event {
	s.t.Helper()
	events, err := s.control.Audit().Since(mark)
	require.NoError(s.t, err)
	return slices.DeleteFunc(events, func(e cluster.Event) bool {
		return e.Stage != cluster.StageComplete || !strings.HasSuffix(e.UserAgent, agent)
	})
}

// manages waits until exactly these namespaces are said to have the Secret.
func (s *system) manages(name string, namespaces ...string) {
	s.t.Helper()
	slices.Sort(namespaces)
	s.becomes(name, func(status v1alpha1.ImagePullSecretStatus) error {
		if !slices.Equal(status.ManagedNamespaces, namespaces) {
			return fmt.Errorf("manages %v, not %v", status.ManagedNamespaces, namespaces)
		}
		return nil
	})
}

// replaceNames puts the names of a test's namespaces into its table.
func replaceNames(text, namespace, kept string) string {
	return strings.NewReplacer("NAMESPACE", namespace, "KEPT", kept).Replace(text)
}

func quantities(name, value string) corev1.ResourceList {
	return corev1.ResourceList{corev1.ResourceName(name): resource.MustParse(value)}
}

// columns are what `kubectl get imps` shows beside the name.
func (s *system) columns() []string {
	s.t.Helper()
	raw, err := s.core.CoreV1().RESTClient().Get().AbsPath("/apis/images.banzaicloud.io/v1alpha1/imagepullsecrets").
		SetHeader("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io").Do(s.t.Context()).Raw()
	require.NoError(s.t, err)
	var table metav1.Table
	require.NoError(s.t, json.Unmarshal(raw, &table))
	var columns []string
	for _, column := range table.ColumnDefinitions[1:] {
		columns = append(columns, column.Name)
	}
	return columns
}

// says waits until a condition's message holds a text.
func (s *system) says(name, conditionType, text string) {
	s.t.Helper()
	s.message(name, conditionType, text, true)
}

func (s *system) saysNot(name, conditionType, text string) {
	s.t.Helper()
	s.message(name, conditionType, text, false)
}

func (s *system) message(name, conditionType, text string, want bool) {
	s.t.Helper()
	s.becomes(name, func(status v1alpha1.ImagePullSecretStatus) error {
		condition := meta.FindStatusCondition(status.Conditions, conditionType)
		if condition == nil || strings.Contains(condition.Message, text) != want {
			return fmt.Errorf("condition %s: %q stands in it: not %t", conditionType, text, want)
		}
		return nil
	})
}

func selfReview() *authenticationv1.SelfSubjectReview { return &authenticationv1.SelfSubjectReview{} }

// ctxOf is the test's context also for its cleanup, when that has ended.
func ctxOf(t *testing.T) context.Context { return context.WithoutCancel(t.Context()) }
