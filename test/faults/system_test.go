package faults

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

const (
	// within is how long anything may take: a Lease runs out after up to 18 s.
	within = 30 * time.Second
	// quiet is how long nothing may be written once all is done. It is longer than a
	// status waits for its next write.
	quiet = 1600 * time.Millisecond
	// linger replaces the minute that a Secret stays after the last Pod.
	linger = 2 * time.Second

	leaseName = "73de1ad9.banzaicloud.io"
	canary    = "canary-77d2c0-never-printed"
)

// system is a cluster with imps in it, for one test. A foreign Secret with the name of the
// targets stands in one namespace throughout.
type system struct {
	t       *testing.T
	core    kubernetes.Interface
	dynamic dynamic.Interface
	// prefix starts the names of everything cluster-scoped that the test makes, and is the
	// label by which its resources select.
	prefix string
	// dir holds the kubeconfigs and logs of its processes.
	dir     string
	foreign *corev1.Secret
	// blocked is the resource that wants the namespace of the foreign Secret.
	blocked *v1alpha1.ImagePullSecret
	history *history
	// kept are the Secrets that were there when all was well, by namespace.
	kept map[string]types.UID
	// patience is how long the test waits for anything.
	patience time.Duration
}

func newSystem(t *testing.T) *system {
	t.Helper()
	core, err := kubernetes.NewForConfig(control.Admin())
	require.NoError(t, err)
	dyn, err := dynamic.NewForConfig(control.Admin())
	require.NoError(t, err)
	s := &system{t: t, core: core, dynamic: dyn, prefix: cluster.Prefix(t), dir: t.TempDir(), kept: map[string]types.UID{}, patience: within}
	s.eventually(func() error { // what the last test left goes in the background
		list, err := core.CoreV1().Secrets("").List(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=" + imps.SecretName})
		if err == nil && len(list.Items) > 0 {
			return fmt.Errorf("%d Secrets are left", len(list.Items))
		}
		return err
	}, "the last test's Secrets do not go")
	s.history = watchHistory(t, core)
	t.Cleanup(s.removeEverything)
	s.foreign, err = core.CoreV1().Secrets(s.namespace("")).Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: imps.SecretName}, Data: map[string][]byte{"mine": []byte("x")},
	}, metav1.CreateOptions{FieldManager: "a-user"})
	require.NoError(t, err)
	s.source("still", "registry.still")
	s.blocked = s.resource("blocked", "still", `namespaces: {names: [`+s.foreign.Namespace+`]}`)
	return s
}

// removeEverything deletes what the test made, so that the next one starts from nothing.
func (s *system) removeEverything() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	all, now := metav1.ListOptions{}, int64(0)
	labelled := metav1.ListOptions{LabelSelector: impsync.LabelComponent}
	core := s.core.CoreV1()
	require.NoError(s.t, s.dynamic.Resource(v1alpha1.Resource).DeleteCollection(ctx, metav1.DeleteOptions{}, all))
	require.NoError(s.t, core.Secrets(s.foreign.Namespace).DeleteCollection(ctx, metav1.DeleteOptions{}, all))
	require.NoError(s.t, core.Secrets(imps.SourceNamespace).DeleteCollection(ctx, metav1.DeleteOptions{}, all))
	require.NoError(s.t, core.Secrets(imps.SystemNamespace).DeleteCollection(ctx, metav1.DeleteOptions{}, labelled))
	require.NoError(s.t, core.Secrets(imps.RenderedNamespace).DeleteCollection(ctx, metav1.DeleteOptions{}, labelled))
	require.NoError(s.t, core.ConfigMaps(imps.SystemNamespace).DeleteCollection(ctx, metav1.DeleteOptions{}, labelled))
	require.NoError(s.t, core.Pods(imps.SystemNamespace).DeleteCollection(ctx, metav1.DeleteOptions{GracePeriodSeconds: &now}, all))
	require.NoError(s.t, core.Nodes().DeleteCollection(ctx, metav1.DeleteOptions{}, all))
	s.freeLease()
}

// freeLease takes the Lease from whoever holds it. Where that was killed, it would expire
// after 15 s; most tests need not wait for that.
func (s *system) freeLease() {
	s.t.Helper()
	err := s.core.CoordinationV1().Leases(imps.SystemNamespace).Delete(context.WithoutCancel(s.t.Context()), leaseName, metav1.DeleteOptions{})
	if !apierrors.IsNotFound(err) {
		require.NoError(s.t, err)
	}
}

// eventually waits until check returns no error.
func (s *system) eventually(check func() error, message string, args ...any) {
	s.t.Helper()
	imps.Eventually(s.t, s.patience, check, message, args...)
}

// pass lets some time pass.
func (s *system) pass(d time.Duration) {
	select {
	case <-time.After(d):
	case <-s.t.Context().Done():
	}
}

// source writes a source Secret for one registry.
func (s *system) source(name, registry string) {
	s.t.Helper()
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Type:       corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: fmt.Appendf(nil,
			`{"auths":{%q:{"username":"robot","password":%q}}}`, registry, canary)},
	}
	secrets := s.core.CoreV1().Secrets(imps.SourceNamespace)
	_, err := secrets.Create(s.t.Context(), secret, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = secrets.Update(s.t.Context(), secret, metav1.UpdateOptions{})
	}
	require.NoError(s.t, err)
}

// resource creates an ImagePullSecret of one source; target is YAML in flow style.
func (s *system) resource(name, source, target string) *v1alpha1.ImagePullSecret {
	s.t.Helper()
	parsed := map[string]any{}
	require.NoError(s.t, yaml.Unmarshal([]byte(`
target: {secret: {name: `+imps.SecretName+`}, `+target+`}
registry: {credentials: [{name: `+source+`, namespace: `+imps.SourceNamespace+`}]}`), &parsed))
	created, err := s.dynamic.Resource(v1alpha1.Resource).Create(s.t.Context(), &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": v1alpha1.GroupVersion.String(), "kind": v1alpha1.Kind.Kind,
		"metadata": map[string]any{"name": s.prefix + "-" + name}, "spec": parsed,
	}}, metav1.CreateOptions{})
	require.NoError(s.t, err)
	return typed(s.t, created)
}

func typed(t *testing.T, object *unstructured.Unstructured) *v1alpha1.ImagePullSecret {
	t.Helper()
	r := &v1alpha1.ImagePullSecret{}
	require.NoError(t, runtime.DefaultUnstructuredConverter.FromUnstructured(object.Object, r))
	return r
}

func (s *system) deleteResource(r *v1alpha1.ImagePullSecret, policy metav1.DeletionPropagation) {
	s.t.Helper()
	require.NoError(s.t, s.dynamic.Resource(v1alpha1.Resource).Delete(s.t.Context(), r.Name, metav1.DeleteOptions{PropagationPolicy: &policy}))
}

// byLabel and byPods are rules that select the namespaces, or those of the Pods, that have
// the test's label with this value.
func (s *system) byLabel(value string) string {
	return `namespaces: {labels: [{matchLabels: {` + s.prefix + `: ` + value + `}}]}`
}

func (s *system) byPods(value string) string {
	return `namespacesWithPods: {labels: [{matchLabels: {` + s.prefix + `: ` + value + `}}]}`
}

// namespace creates a namespace, with the test's label unless that is empty.
func (s *system) namespace(label string) string {
	s.t.Helper()
	if label == "" {
		return control.Namespace(s.t, nil)
	}
	return control.Namespace(s.t, map[string]string{s.prefix: label})
}

// label changes the test's label of a namespace.
func (s *system) label(namespace, value string) {
	s.t.Helper()
	_, err := s.core.CoreV1().Namespaces().Patch(s.t.Context(), namespace, types.MergePatchType,
		fmt.Appendf(nil, `{"metadata":{"labels":{%q:%q}}}`, s.prefix, value), metav1.PatchOptions{})
	require.NoError(s.t, err)
}

func (s *system) namespaces(n int, label string) []string {
	s.t.Helper()
	var names []string
	for range n {
		names = append(names, s.namespace(label))
	}
	return names
}

// pod creates a Pod with the test's label that is bound to a node and waits for its image.
func (s *system) pod(namespace, node, label string) *corev1.Pod {
	s.t.Helper()
	grace, automount := int64(0), false
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "pod-", Labels: map[string]string{s.prefix: label}},
		Spec: corev1.PodSpec{
			NodeName: node, TerminationGracePeriodSeconds: &grace, AutomountServiceAccountToken: &automount,
			Containers: []corev1.Container{{Name: "main", Image: "registry.invalid/main"}},
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
	require.NoError(s.t, s.core.CoreV1().Pods(pod.Namespace).Delete(s.t.Context(), pod.Name, metav1.DeleteOptions{}))
}

// report returns the report of a node and its UID, an error where there is none.
func (s *system) report(node string) (impsync.Report, types.UID, error) {
	c, err := s.core.CoreV1().ConfigMaps(imps.SystemNamespace).Get(s.t.Context(), impsync.ReportName(node), metav1.GetOptions{})
	if err != nil {
		return impsync.Report{}, "", err
	}
	r, err := impsync.DecodeReport(c.Data)
	return r, c.UID, err
}

// demands waits until the report of a node demands exactly these namespaces.
func (s *system) demands(node string, namespaces ...string) {
	s.t.Helper()
	s.eventually(func() error {
		r, _, err := s.report(node)
		if have := slices.Sorted(maps.Keys(r.Demand)); err == nil && !slices.Equal(have, sorted(namespaces)) {
			return fmt.Errorf("it demands %v", have)
		}
		return err
	}, "the report of %s does not come to demand %v", node, namespaces)
}

func sorted(names []string) []string { return slices.Sorted(slices.Values(names)) }

// want is what is to come of one resource.
type want struct {
	resource   *v1alpha1.ImagePullSecret
	registry   string
	namespaces []string
}

// settles waits until everything is as wanted, and makes sure that it stays so: no Secret
// is written any more, and what was there before is still the same object.
func (s *system) settles(wants ...want) {
	s.t.Helper()
	s.eventually(func() error { return s.settled(wants) }, "not everything comes to be as wanted")
	mark := control.Audit().Mark()
	s.pass(quiet)
	require.Empty(s.t, s.writes(mark), "written although nothing was to be done")
	// A status or a report may come after what it tells of, once; what is tried again and
	// again never ends.
	s.eventually(func() error {
		if tries := s.tries(mark); len(tries) > 0 {
			mark = control.Audit().Mark()
			s.pass(quiet)
			return fmt.Errorf("imps goes on: %v", tries)
		}
		return nil
	}, "imps does not become silent")
	require.NoError(s.t, s.settled(wants))
	require.NoError(s.t, s.history.err())
	for _, secret := range s.secrets() {
		s.kept[secret.Namespace] = secret.UID
	}
}

// settled returns what is not as wanted.
func (s *system) settled(wants []want) error {
	wants = append(slices.Clone(wants), want{resource: s.blocked, registry: "registry.still"})
	selected := map[string]want{}
	for _, w := range wants {
		for _, namespace := range w.namespaces {
			selected[namespace] = w
		}
	}
	counters, err := s.counters(wants)
	if err != nil {
		return err
	}
	for _, secret := range s.secrets() {
		w, ok := selected[secret.Namespace]
		delete(selected, secret.Namespace)
		switch {
		case secret.Namespace == s.foreign.Namespace:
			if secret.UID != s.foreign.UID || secret.ResourceVersion != s.foreign.ResourceVersion {
				return errors.New("the foreign Secret was touched")
			}
			continue
		case !ok:
			return fmt.Errorf("nobody wants the Secret in %s", secret.Namespace)
		case s.kept[secret.Namespace] != "" && s.kept[secret.Namespace] != secret.UID:
			return fmt.Errorf("the Secret in %s is not the one that was there", secret.Namespace)
		}
		if err := w.fits(&secret, counters[w.resource.UID]); err != nil {
			return fmt.Errorf("the Secret in %s: %w", secret.Namespace, err)
		}
	}
	if len(selected) > 0 {
		return fmt.Errorf("no Secret in %v", slices.Sorted(maps.Keys(selected)))
	}
	for _, w := range wants {
		if err := s.statusTrue(w); err != nil {
			return err
		}
	}
	return nil
}

// secrets returns all Secrets of the targets' name.
func (s *system) secrets() []corev1.Secret {
	s.t.Helper()
	list, err := s.core.CoreV1().Secrets("").List(s.t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=" + imps.SecretName})
	require.NoError(s.t, err)
	return list.Items
}

// counters returns the counter of each wanted resource. Its rendered and its state Secret
// must be there, and none of any other resource.
func (s *system) counters(wants []want) (map[types.UID]uint64, error) {
	counters := map[types.UID]uint64{}
	rendered, err := s.core.CoreV1().Secrets(imps.RenderedNamespace).List(s.t.Context(), metav1.ListOptions{LabelSelector: impsync.LabelComponent})
	require.NoError(s.t, err)
	for i := range rendered.Items {
		r, err := impsync.DecodeRendered(&rendered.Items[i], impsync.FormatVersions())
		if err != nil {
			return nil, err
		}
		counters[r.Resource.UID] = r.Target.Revision().Counter
	}
	states, err := s.core.CoreV1().Secrets(imps.SystemNamespace).List(s.t.Context(), metav1.ListOptions{LabelSelector: impsync.LabelComponent})
	require.NoError(s.t, err)
	var have, wanted []string
	for i := range states.Items {
		have = append(have, states.Items[i].Name)
	}
	for uid := range counters {
		have = append(have, impsync.RenderedName(uid))
	}
	for _, w := range wants {
		wanted = append(wanted, impsync.RenderedName(w.resource.UID), impsync.StateName(w.resource.UID))
	}
	if slices.Sort(have); !slices.Equal(have, sorted(wanted)) {
		return nil, fmt.Errorf("imps's own Secrets are %v, not %v", have, sorted(wanted))
	}
	return counters, nil
}

// fits returns what is wrong with a target Secret.
func (w want) fits(secret *corev1.Secret, counter uint64) error {
	var config struct {
		Auths map[string]json.RawMessage `json:"auths"`
	}
	if err := json.Unmarshal(secret.Data[corev1.DockerConfigJsonKey], &config); err != nil {
		return err
	}
	if have := slices.Sorted(maps.Keys(config.Auths)); !slices.Equal(have, []string{w.registry}) {
		return fmt.Errorf("it has %v, not %s", have, w.registry)
	}
	revision := impsync.Revision{UID: w.resource.UID, Counter: counter}
	if have := secret.Annotations[impsync.AnnotationRevision]; have != revision.String() {
		return fmt.Errorf("it has revision %s, not %s", have, revision)
	}
	if have := secret.Labels[impsync.LabelOwnerUID]; have != string(w.resource.UID) {
		return fmt.Errorf("it says that %s owns it", have)
	}
	if len(secret.OwnerReferences) != 1 || secret.OwnerReferences[0].UID != w.resource.UID {
		return fmt.Errorf("its owners are %v", secret.OwnerReferences)
	}
	for _, entry := range secret.ManagedFields {
		if entry.Manager != impsync.FieldManager || entry.Operation != metav1.ManagedFieldsOperationApply {
			return fmt.Errorf("%s owns fields of it by %s", entry.Manager, entry.Operation)
		}
	}
	return nil
}

// statusTrue returns where a status does not say what is true.
func (s *system) statusTrue(w want) error {
	object, err := s.dynamic.Resource(v1alpha1.Resource).Get(s.t.Context(), w.resource.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	r := typed(s.t, object)
	delivered, blocked := int64(len(w.namespaces)), int64(0)
	state, reason := v1alpha1.StatusReady, ""
	if w.resource == s.blocked {
		blocked, state, reason = 1, v1alpha1.StatusFailed, s.foreign.Namespace+": a Secret of that name is there that is not imps's"
	}
	n := r.Status.Namespaces
	if n == nil || n.Delivered != delivered || n.Selected != delivered+blocked || r.Status.Status != state ||
		!strings.Contains(r.Status.Reason, reason) || r.Status.ObservedGeneration != r.Generation ||
		!slices.Equal(r.Status.ManagedNamespaces, sorted(w.namespaces)) {
		return fmt.Errorf("the status of %s is %+v (%+v)", r.Name, r.Status, n)
	}
	return nil
}

// writes counts the successful writes of each Secret by imps since mark.
func (s *system) writes(mark cluster.Mark) map[string]int {
	s.t.Helper()
	writes := map[string]int{}
	for _, e := range s.requests(mark) {
		if e.Resource == "secrets" && e.Code < 300 && isWrite(e.Verb) {
			writes[e.Namespace+"/"+e.Name]++
		}
	}
	return writes
}

// tries returns what imps tried to write since mark but Lease and Events, whatever became
// of it.
func (s *system) tries(mark cluster.Mark) (tries []string) {
	s.t.Helper()
	for _, e := range s.requests(mark) {
		if isWrite(e.Verb) && !slices.Contains([]string{"leases", "events", "selfsubjectreviews"}, e.Resource) {
			tries = append(tries, fmt.Sprintf("%s %s %s/%s: %d", e.Verb, e.Resource, e.Namespace, e.Name, e.Code))
		}
	}
	return tries
}

// requests returns the answered requests of imps since mark.
func (s *system) requests(mark cluster.Mark) []cluster.Event {
	s.t.Helper()
	events, err := control.Audit().Since(mark)
	require.NoError(s.t, err)
	return slices.DeleteFunc(events, func(e cluster.Event) bool {
		return e.Stage != cluster.StageComplete || !strings.HasPrefix(e.UserAgent, "imps-node/")
	})
}

func isWrite(verb string) bool {
	return slices.Contains([]string{"create", "update", "patch", "delete"}, verb)
}

// own returns the names under which writes counts the rendered and the state Secret.
func own(r *v1alpha1.ImagePullSecret) (rendered, state string) {
	return imps.RenderedNamespace + "/" + impsync.RenderedName(r.UID), imps.SystemNamespace + "/" + impsync.StateName(r.UID)
}

// rotation is what writes counts of a rotation that nothing disturbs.
func rotation(w want) map[string]int {
	rendered, state := own(w.resource)
	writes := map[string]int{rendered: 1, state: 1}
	for _, namespace := range w.namespaces {
		writes[target(namespace)] = 1
	}
	return writes
}

// target is the name under which writes counts a target Secret.
func target(namespace string) string { return namespace + "/" + imps.SecretName }

// findCanary returns an error where text holds the credential in any form.
func findCanary(text string) error {
	for _, form := range []string{canary, base64.StdEncoding.EncodeToString([]byte(canary)), base64.StdEncoding.EncodeToString([]byte("robot:" + canary))} {
		if strings.Contains(text, strings.TrimRight(form, "=")) {
			return errors.New("a credential stands in it")
		}
	}
	return nil
}
