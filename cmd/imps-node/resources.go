package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/validation"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
)

// parseResources returns the ImagePullSecrets of a YAML stream, or of a JSON document;
// lists are taken apart. It is strict: what an API server would drop, such as a misspelt
// field, is an error.
func parseResources(r io.Reader) ([]*v1alpha1.ImagePullSecret, error) {
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	var resources []*v1alpha1.ImagePullSecret
	reader := utilyaml.NewYAMLReader(bufio.NewReader(r))
	for number := 1; ; number++ {
		text, err := reader.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		var objects []json.RawMessage
		if err == nil {
			objects, err = parseDocument(text)
		}
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", number, err)
		}
		for _, object := range objects {
			resource, err := parseResource(decoder, object)
			if err != nil {
				return nil, fmt.Errorf("document %d: %w", number, err)
			}
			if slices.ContainsFunc(resources, func(r *v1alpha1.ImagePullSecret) bool { return r.Name == resource.Name }) {
				return nil, fmt.Errorf("document %d: ImagePullSecret %s is there twice", number, resource.Name)
			}
			resources = append(resources, resource)
		}
	}
	if len(resources) == 0 {
		return nil, errors.New("there is no ImagePullSecret")
	}
	return resources, nil
}

// parseDocument returns the objects of a document as JSON: none where it is empty, and
// several where it is a list.
func parseDocument(text []byte) ([]json.RawMessage, error) {
	document, err := yaml.YAMLToJSONStrict(text)
	if err != nil {
		return nil, err
	}
	if string(document) == "null" {
		return nil, nil
	}
	var list struct {
		metav1.TypeMeta `json:",inline"`
		Items           []json.RawMessage `json:"items"`
	}
	if err := json.Unmarshal(document, &list); err != nil {
		return nil, errors.New("it is no object")
	}
	if list.Kind == "List" || list.Kind == v1alpha1.Kind.Kind+"List" {
		return list.Items, nil
	}
	return []json.RawMessage{document}, nil
}

func parseResource(decoder runtime.Decoder, object json.RawMessage) (*v1alpha1.ImagePullSecret, error) {
	var kind metav1.TypeMeta
	if err := json.Unmarshal(object, &kind); err != nil {
		return nil, errors.New("it is no object")
	}
	if kind.GroupVersionKind() != v1alpha1.Kind {
		return nil, fmt.Errorf("it has apiVersion %q and kind %q, and only %s %s can be planned",
			kind.APIVersion, kind.Kind, v1alpha1.GroupVersion, v1alpha1.Kind.Kind)
	}
	resource := &v1alpha1.ImagePullSecret{}
	if _, _, err := decoder.Decode(object, nil, resource); err != nil {
		return nil, errors.New(strings.TrimPrefix(err.Error(), "strict decoding error: "))
	}
	if problems := validation.IsDNS1123Subdomain(resource.Name); len(problems) > 0 {
		return nil, fmt.Errorf("metadata.name %q is not a valid name: %s", resource.Name, problems[0])
	}
	return resource, nil
}
